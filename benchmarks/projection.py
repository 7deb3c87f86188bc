"""How well step times on some numbers of processes predict those on another: python -m benchmarks.projection

    python -m benchmarks.projection [--rounds 4] [--json]

Trains on 1, 2 and 4 processes (gloo, one thread each) with three batch sizes, and predicts the steps of each
number of processes from the two others by analysis.step_cost, as a report does. The numbers of processes take
turns, so that a drift of the machine hits all alike. Processes that outnumber the cores share them; the
projection knows how many there are. Exit code 1 when an error passes its target.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from analysis.records import table
from analysis.step_cost import Machine, StepTrace, cells, checks, cost, step_trace
from analysis.synchronisation import Network
from benchmarks.printing import beside_json, print_json
from benchmarks.step import trainer
from pipeline.config import Config
from pipeline.data import prepare
from pipeline.store import RunDirectory, home
from tests.distributed import gloo_ranks
from tests.support import config

RANKS = (1, 2, 4)
BATCHES = (32, 64, 128)
# Micro-batches that take longer than what wraps them, as they do on a GPU.
COMMON = ["model=tiny", "data.sequence_length=128", "data.micro_batch=8", "budget.tokens=50M"]
STEPS = 15  # of each run
TARGET = 0.25  # of the error in the time of the median steps


def setting(ranks: int, batch: int, number: int, more: Sequence[str] = ()) -> Config:
    mesh = ["parallel=ddp", f"parallel.replicate={ranks}", "launch.cpus_per_task=1"]
    return config(*COMMON, *mesh, f"batch.size={batch}", f"seed={number}", *more)


def run_steps(rank: int, configs: list[Config]) -> None:
    """One rank of these runs, one after the other."""
    for composed in configs:
        run = trainer(composed, rank)
        run.resumed_at = time.perf_counter()
        for _ in range(STEPS):
            run.step()
        run.close(0)


def train(rounds: int, ranks: Sequence[int] = RANKS, more: Sequence[str] = ()) -> list[StepTrace]:
    """Of runs with every batch on every number of ranks, in home()."""
    done: list[Config] = []
    for number in range(rounds):
        for count in ranks:
            configs = [setting(count, batch, number, more) for batch in BATCHES]
            prepare(configs[0].data, home() / "corpora")
            gloo_ranks(count, run_steps, configs, timeout_s=300)
            done += configs
    machine = Machine(os.cpu_count() or 1, None)
    return [step_trace(composed, machine, table(RunDirectory.of(composed).rows())) for composed in done]


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
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        os.environ["CRESCENDO_HOME"] = directory
        runs = train(arguments.rounds)
    figures = predict(runs)
    worst = max(abs(found["error"]) for found in figures["errors"])
    if arguments.json:
        print_json(figures, target=TARGET, met=worst <= TARGET)
    with beside_json(arguments.json):
        for found in figures["errors"]:
            print(
                f"steps on {found['ranks']} processes, from those on {found['from_ranks']}: "
                f"{found['error']:+.0%} of {found['measured_s'] / found['steps'] * 1000:.1f} ms"
            )
        print(f"largest error {worst:.0%}, target {TARGET:.0%}: {'met' if worst <= TARGET else 'MISSED'}")
    return 0 if worst <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
