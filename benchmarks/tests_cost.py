"""What one test of the batch costs on small problems, beside gradients of all samples by vmap on a copy.

    python -m benchmarks.tests_cost [--rounds 3] [--json] [--only logistic cnn resnet18]

The norm test and the augmented inner-product test, each in three ways: from our unit statistics (micro-
batches, along the momentum), from our exact ones (single samples, along the step's own gradient), and as one
would do it otherwise: gradients of all samples by vmap(grad(functional_call)) on a deep copy of the model, as
the code of AdAdaGrad does (Lau et al. 2024), and the formulas on these. That way is given the cheapest
arithmetic we know for it: sums of squares and products over the whole model, and for the norm test nothing is
kept between micro-batches.

A cost is the time that a step takes above a plain one, over that of a plain one. Variants take turns, one
step each and in random order, so that a drift of the machine hits all alike; the figures are medians of the
ratios within a round, with their quartiles, and beside them the ratios of processor time, which other work on
the machine disturbs less. Small problems get more rounds. Random data of the shapes of MNIST and CIFAR, one
thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import pipeline.samples
from benchmarks.printing import beside_json, print_json
from benchmarks.statistics import Steady, set_batch
from benchmarks.step import EVERY_STEP
from benchmarks.timing import Seconds, in_turns, ratio
from pipeline.batch._interface import Needs
from pipeline.gradients.capture import capture_for
from pipeline.samples._samples import Samples, Split
from pipeline.store import RunDirectory, home
from pipeline.train import Trainer
from tests.distributed import ranks_of
from tests.support import config

CLASSES, MADE_UP = 10, 2048  # samples
COMMON = ["data=digits", "optim=sgd", "optim.lr=1e-4", "budget.tokens=1M"]
CHEAPER, NO_SLOWER = 5.0, 1.0  # targets: cost of vmap over that of unit statistics, and of exact ones


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, ...]  # of a sample
    batch: int
    micro_batch: int
    rounds: int  # for each that is asked for


PROBLEMS = {
    "logistic": Problem((784,), 128, 32, 25),
    "cnn": Problem((1, 28, 28), 64, 16, 5),
    "resnet18": Problem((3, 32, 32), 32, 8, 1),
}


class ByVmap:
    """Both tests from the gradients of all samples of the step."""

    def __init__(self, trainer: Trainer, augmented: bool) -> None:
        self._trainer, self._augmented, self._loss = trainer, augmented, trainer._loss
        trainer._loss = self._see  # type: ignore[method-assign]
        self.variance = self.along = self.across = 0.0  # of the last step

    def step(self) -> None:
        self._copy = copy.deepcopy(self._trainer.model)
        self._weights = {name: weight.detach() for name, weight in self._copy.named_parameters()}
        self._count, self._sum_squares = 0, torch.zeros((), dtype=torch.float64)
        self._sums = [torch.zeros_like(weight) for weight in self._weights.values()]
        self._kept: list[list[Tensor]] = []
        self._trainer.step()
        mean = [total / self._count for total in self._sums]
        squared = sum(float(part.square().sum()) for part in mean)
        squares, freedom = float(self._sum_squares), self._count - 1
        self.variance = (squares - self._count * squared) / freedom
        if self._augmented:
            products = torch.cat(
                [
                    sum(
                        (g.flatten(1) @ m.flatten() for g, m in zip(of_samples, mean, strict=True)),
                        torch.zeros(()),
                    )
                    for of_samples in self._kept
                ]
            ).double()
            self.along = float((products - squared).square().sum() / freedom / squared)
            self.across = float((squares - products.square().sum() / squared) / freedom)

    def _see(self, inputs: Tensor, targets: Tensor) -> Tensor:
        gradients = vmap(grad(self._loss_of_one), (None, 0, 0))(self._weights, inputs, targets)
        self._count += len(targets)
        for total, g in zip(self._sums, gradients.values(), strict=True):
            self._sum_squares += g.square().sum()
            total += g.sum(0)
        if self._augmented:
            self._kept.append(list(gradients.values()))
        return self._loss(inputs, targets)

    def _loss_of_one(self, weights: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(self._copy, weights, (inputs[None],))
        return torch.nn.functional.cross_entropy(logits, target[None])


PLAIN = "plain"
NEEDS = {
    PLAIN: None,
    "norm test, units": Needs("microbatch"),
    "norm test, samples": Needs("sample"),
    "augmented test, units": Needs("microbatch", direction="momentum"),
    "augmented test, samples": Needs("sample", direction="in_sample"),
}
TESTS = ("norm test", "augmented test")


def trainer_of(name: str, variant: str) -> Trainer:
    """Of this problem, that measures what the variant needs in every step."""
    problem = PROBLEMS[name]
    sizes = [f"batch.size={problem.batch}", f"data.micro_batch={problem.micro_batch}"]
    composed = config(f"model={name}", *COMMON, *EVERY_STEP, *sizes)
    random = np.random.default_rng(0)
    inputs = random.normal(size=(MADE_UP, *problem.shape)).astype(np.float32)
    samples = Samples(inputs, random.integers(0, CLASSES, MADE_UP), CLASSES)
    with patch.object(pipeline.samples, "read", return_value=Split.of(samples, samples)):
        trainer = Trainer(
            composed, RunDirectory(home() / "runs" / f"{name} {variant}"), 1, ranks_of(composed)
        )
    needs = NEEDS.get(variant)
    trainer.schedule, trainer.capture = Steady(composed, needs), None
    if needs:
        trainer.capture = capture_for(needs, trainer.model, trainer.optimizer, trainer.ranks)
    set_batch(trainer, problem.batch)
    return trainer


def step_times(name: str, rounds: int) -> Seconds:
    trainers = {variant: trainer_of(name, variant) for variant in NEEDS}
    steps: dict[str, Callable[[], None]] = {variant: trainer.step for variant, trainer in trainers.items()}
    for test in TESTS:
        variant = f"{test}, vmap"
        trainers[variant] = trainer_of(name, variant)
        steps[variant] = ByVmap(trainers[variant], augmented=test == "augmented test").step
    seconds = in_turns(steps, rounds * PROBLEMS[name].rounds, warm_up=1)
    for trainer in trainers.values():
        trainer.close(0)
    return seconds


def figures_of(seconds: Seconds) -> dict[str, dict[str, Any]]:
    """By test: the cost of each way, and how many times as much vmap costs."""
    figures: dict[str, dict[str, Any]] = {}
    for test in TESTS:
        costs = {}
        for way in ("units", "samples", "vmap"):
            found = ratio(seconds[f"{test}, {way}"], seconds[PLAIN])
            costs[way] = {key: value - 1 for key, value in found.items()}
            costs[way]["cost"] = costs[way].pop("ratio")
        against = {way: _times(costs["vmap"]["cost"], costs[way]["cost"]) for way in ("units", "samples")}
        met = against["units"] >= CHEAPER and against["samples"] >= NO_SLOWER
        figures[test] = {"costs": costs, "vmap costs as many times": against, "met": met}
    return figures


def _times(cost: float, of: float) -> float:
    """How many times `of` goes into `cost`; a cost lost in the noise counts for a thousandth of a step."""
    return cost / max(of, 1e-3)


def show(name: str, seconds: Seconds, figures: dict[str, dict[str, Any]]) -> None:
    plain = statistics.median(wall for wall, _ in seconds[PLAIN])
    print(f"{name}: batch {PROBLEMS[name].batch}, plain step {plain * 1000:.1f} ms", flush=True)
    for test, figure in figures.items():
        for way, cost in figure["costs"].items():
            times = figure["vmap costs as many times"].get(way)
            target = {"units": CHEAPER, "samples": NO_SLOWER}.get(way, 0.0)
            verdict = ""
            if times is not None:
                verdict = f"vmap {times:.1f}×, target ≥ {target:g}  {'met' if times >= target else 'MISSED'}"
            print(
                f"  {test + ', ' + way:26} {cost['cost']:+.3f}  [{cost['q1']:.3f}, {cost['q3']:.3f}]  "
                f"processor time {cost['processor']:+.3f}  fastest {cost['fastest']:+.3f}  {verdict}",
                flush=True,
            )


def measure(names: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        seconds = step_times(name, rounds)
        figures = figures_of(seconds)
        found[name] = {"tests": figures, "plain_s": statistics.median(wall for wall, _ in seconds[PLAIN])}
        show(name, seconds, figures)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        os.environ["CRESCENDO_HOME"] = directory
        with beside_json(arguments.json):
            found = measure(arguments.only, arguments.rounds)
    if arguments.json:
        print_json(found)
    return 0 if all(test["met"] for problem in found.values() for test in problem["tests"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
