"""How well step times on some numbers of processes predict those on another: python -m benchmarks.projection

    python -m benchmarks.projection [--rounds 80] [--json]

Trains on 1, 2 and 4 processes (gloo, one thread each) with three batch sizes, and predicts the steps of each
number of processes from the two others by analysis.step_cost, as a report does. All runs exist at once and
take turns, one step each in a round, so that a drift of the machine hits all alike. Processes that outnumber
the cores share them; the projection knows how many there are. Exit code 1 when an error passes its target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch

from analysis.records import table
from analysis.step_cost import Machine, StepTrace, cells, checks, cost, step_trace
from analysis.synchronisation import Network
from benchmarks.step import trainer
from pipeline.config import Config
from pipeline.data import prepare
from pipeline.store import RunDirectory, home
from tests.distributed import gloo_ranks
from tests.support import config

RANKS = (1, 2, 4)
BATCHES = (4, 8, 16)
COMMON = ["model=tiny", "data.sequence_length=64", "data.micro_batch=1", "budget.tokens=50M"]
TARGET = 0.25  # of the error in the time of the median steps
TURN_S = 120  # a turn that takes longer has failed


def setting(ranks: int, batch: int, more: Sequence[str] = ()) -> Config:
    mesh = ["parallel=ddp", f"parallel.replicate={ranks}", "launch.cpus_per_task=1"]
    return config(*COMMON, *mesh, f"batch.size={batch}", *more)


def take_turns(rank: int, configs: list[Config], rounds: int, go: Semaphore, done: Semaphore) -> None:
    """One rank of the runs `configs`, which exist side by side: a step of one whenever `go` allows."""
    # A share of a busy machine for each rank, not one for all: Linux divides it among sessions first.
    os.setsid()
    cores = sorted(os.sched_getaffinity(0))
    # Waking on a busy machine, two ranks may meet on one core and stay there while the other core is free.
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    runs, order = [trainer(composed, rank) for composed in configs], random.Random(0)
    for _ in range(rounds):
        order.shuffle(runs)  # the same on all ranks
        for run in runs:
            done.release()
            _wait(go)
            run.resumed_at = time.perf_counter()
            run.step()
    for run in runs:
        run.close(0)
    done.release()


def _wait(signal: Semaphore) -> None:
    if not signal.acquire(timeout=TURN_S):
        raise TimeoutError(f"a turn did not end within {TURN_S} s")


def train(
    rounds: int, ranks: Sequence[int] = RANKS, more: Sequence[str] = ()
) -> tuple[list[StepTrace], list[int]]:
    """Traces of all runs, in home(); and how many other processes were at work, from time to time."""
    configs = {count: [setting(count, batch, more) for batch in BATCHES] for count in ranks}
    prepare(configs[ranks[0]][0].data, home() / "corpora")
    context = multiprocessing.get_context("spawn")
    turns = {count: (context.Semaphore(0), context.Semaphore(0)) for count in ranks}
    others = []
    with ThreadPoolExecutor(len(ranks)) as threads:
        worlds = {
            count: threads.submit(
                gloo_ranks, count, take_turns, configs[count], rounds, *turns[count], timeout_s=900
            )
            for count in ranks
        }
        try:
            for turn in range(rounds * len(BATCHES) + 1):
                for count, (go, done) in turns.items():
                    for _ in range(count):
                        _wait(done)
                    if turn == rounds * len(BATCHES):
                        continue
                    others.append(other_processes())
                    for _ in range(count):
                        go.release()
        except TimeoutError:
            for world in worlds.values():
                world.result()  # raises what failed
            raise
    machine = Machine(os.cpu_count() or 1, None)
    runs = [(composed, RunDirectory.of(composed).rows()) for own in configs.values() for composed in own]
    return [step_trace(composed, machine, table(rows)) for composed, rows in runs], others


def other_processes() -> int:
    """At work on this machine, while those of this benchmark wait."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("procs_running"):
            return int(line.split()[1]) - 1
    return 0


def predict(runs: Sequence[StepTrace]) -> dict[str, Any]:
    """Median steps: as measured, as the model fits them, and its error where it had to do without them."""
    found = cells(runs, Network())
    fitted = cost(found)
    assert fitted
    return {
        "cost": asdict(fitted),
        "errors": [asdict(check) | {"error": check.error} for check in checks(found)],
        "steps": [
            {
                "ranks": cell.mesh[0],
                "accumulation": cell.accumulation,
                "measured_s": cell.seconds,
                "model_s": fitted.in_cell(cell),
                "steps": cell.steps,
            }
            for cell in found
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        os.environ["CRESCENDO_HOME"] = directory
        runs, others = train(arguments.rounds)
    figures = predict(runs)
    worst = max(abs(found["error"]) for found in figures["errors"])
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    machine["other processes at work, mean"] = statistics.mean(others)
    if arguments.json:
        content = {"machine": machine, "figures": figures, "target": TARGET, "met": worst <= TARGET}
        print(json.dumps(content, indent=1))
    else:
        print(f"{statistics.mean(others):.1f} other processes were at work on {os.cpu_count()} cores")
        for found in figures["errors"]:
            print(
                f"steps on {found['ranks']} processes, from those on {found['from_ranks']}: "
                f"{found['error']:+.0%} of {found['measured_s'] / found['steps'] * 1000:.1f} ms"
            )
        print(f"largest error {worst:.0%}, target {TARGET:.0%}: {'met' if worst <= TARGET else 'MISSED'}")
    return 0 if worst <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
