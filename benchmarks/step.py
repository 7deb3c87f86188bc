"""What a training step costs beside a minimal loop, and what the norm test adds to it.

    python -m benchmarks.step [--rounds 12] [--json]

Variants take turns, one step each and in random order, so that a drift of the machine hits all alike; the
figures are medians of the ratios within a round, with their quartiles. One thread per process. The ratio of
processor time stands beside that of wall time: other work on the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch

from benchmarks.printing import beside_json, print_json
from benchmarks.timing import Seconds, in_turns, ratio
from pipeline.config import Config
from pipeline.data import Stream, prepare
from pipeline.model.init import initialise
from pipeline.model.llama import Llama, loss_sum
from pipeline.store import RunDirectory, home
from pipeline.train import Trainer
from tests.distributed import gloo_ranks, ranks_of
from tests.support import config

COMMON = ["model=10m", "data.sequence_length=256", "data.micro_batch=4", "batch.size=8", "budget.tokens=50M"]
# Passes at every test, so that both variants do the same work: the cost seen is the measurement alone.
EVERY_STEP = ["batch=norm_test", "batch.size=8", "batch.max_size=1024", "batch.eta=1e6"]
TARGETS = {"plain / hand-written, tokens per second": 0.97, "norm test, single": 1.02, "norm test, ddp": 1.02}


def hand_written(composed: Config) -> Callable[[], None]:
    """A minimal loop over the same model, data, batch and optimizer, as one would write it for one run."""
    model = Llama(composed.model)
    initialise(model, composed.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    data, micro, length = composed.data, composed.data.micro_batch, composed.data.sequence_length
    stream = Stream(prepare(data, home() / "corpora").train, length, data.seed)
    accumulation, position = composed.batch.size // micro, 0

    def step() -> None:
        nonlocal position
        total = 0.0
        for _ in range(accumulation):
            tokens = torch.from_numpy(stream.read(position, micro))
            position += micro
            loss = loss_sum(model(tokens[:, :-1]), tokens[:, 1:]) / (micro * length * accumulation)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trainer(composed: Config, rank: int = 0) -> Trainer:
    run = RunDirectory.of(composed)
    if rank == 0:
        run.freeze(composed)
    return Trainer(composed, run, 1, ranks_of(composed, rank))


def single(rounds: int) -> Seconds:
    plain, tested = config(*COMMON), config(*COMMON, *EVERY_STEP)
    variants = {"hand": hand_written(plain), "plain": trainer(plain).step, "tested": trainer(tested).step}
    return in_turns(variants, rounds)


def ddp(rank: int, rounds: int) -> Seconds:
    plain, tested = (config(*COMMON, *more, "parallel=ddp", "batch.size=16") for more in ([], EVERY_STEP))
    return in_turns({"plain": trainer(plain, rank).step, "tested": trainer(tested, rank).step}, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        os.environ["CRESCENDO_HOME"] = directory
        alone = single(arguments.rounds)
        ranks = gloo_ranks(2, ddp, arguments.rounds, timeout_s=1800)[0]
    figures = {
        "plain / hand-written, tokens per second": ratio(alone["hand"], alone["plain"]),
        "norm test, single": ratio(alone["tested"], alone["plain"]),
        "norm test, ddp": ratio(ranks["tested"], ranks["plain"]),
    }
    met = {
        name: figure["ratio"] >= TARGETS[name] if TARGETS[name] < 1 else figure["ratio"] <= TARGETS[name]
        for name, figure in figures.items()
    }
    if arguments.json:
        print_json(figures, met=met, seconds={"single": alone, "ddp": ranks})
    with beside_json(arguments.json):
        step = statistics.median(wall for wall, _ in alone["plain"])
        print(f"10m model, 2048 tokens a step and rank, one thread; plain step {step * 1000:.0f} ms")
        for name, figure in figures.items():
            target = f"{'≥' if TARGETS[name] < 1 else '≤'} {TARGETS[name]}"
            print(
                f"{name:42}  {figure['ratio']:.3f}  [{figure['q1']:.3f}, {figure['q3']:.3f}]  "
                f"processor time {figure['processor']:.3f}  target {target}"
                f"  {'met' if met[name] else 'MISSED'}"
            )
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
