"""Synthetic gradients, and their statistics computed directly from them."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.batch import schedule_class
from pipeline.batch._interface import BatchSchedule, Decision, State, StepDone, round_up
from pipeline.config import Config
from pipeline.gradients.statistics import (
    BINS_PER_OCTAVE,
    LOWEST_OCTAVE,
    RATIO_BINS,
    Coordinates,
    GradientStatistics,
    Projections,
    WorkerProducts,
)
from tests.support import config

Vectors = NDArray[np.float64]

SMALL = [
    "model=tiny",
    "data.sequence_length=128",
    "data.micro_batch=4",
    "budget.tokens=256k",
]  # 2000 sequences

NORM_TEST = ["batch=norm_test"]
ADAPTIVE = {
    "norm_test": NORM_TEST,
    "norm_test of workers": [*NORM_TEST, "parallel=ddp", "batch.estimator=worker"],
    "norm_test as printed": [*NORM_TEST, "parallel=ddp", "batch.estimator=paper"],
    "inner_product": ["batch=inner_product"],
    "inner_product split": ["batch=inner_product", "batch.theta=null", "batch.nu=null", "batch.epsilon=0.5"],
    "inner_product in sample": ["batch=inner_product", "batch.direction=in_sample", "parallel=ddp"],
    "noise_scale": ["batch=noise_scale"],
    "noise_scale l1": [
        *["batch=noise_scale", "batch.norm=l1", "batch.signal=plain"],
        *["batch.estimator=worker", "parallel=ddp"],
    ],
    "coordinate_norm_test": ["batch=coordinate_norm_test", "parallel=ddp"],
}
SAMPLES = ["model=logistic", "data=digits", "data.sequence_length=1", "batch.estimator=sample"]


@cache
def small(*overrides: str) -> Config:
    return config(*SMALL, *overrides)


def schedule_of(composed: Config) -> BatchSchedule:
    return schedule_class(composed.batch.schedule)(composed)


def gradients(seed: int = 0, units: int = 8, signal: float = 1.0) -> Vectors:
    """Of so many units [units, 50], each with noise of variance 1 in every coordinate."""
    rng = np.random.default_rng(seed)
    return signal * np.ones(50) / math.sqrt(50) + rng.normal(size=(units, 50))


def statistics(g: Vectors, unit: int = 4, direction: Vectors | None = None) -> GradientStatistics:
    """Of equal units of `unit` sequences with these mean gradients [units, parameters]; the units are micro-
    batches and workers at once, so that every schedule finds what it needs."""
    mean, squares = g.mean(axis=0), (g**2).sum(axis=1)
    if direction is None:
        direction = np.ones(g.shape[1])
    sequences = (unit,) * len(g)
    return GradientStatistics(
        units=len(g),
        sequences=unit * len(g),
        sum_weighted_sq_norm=unit * squares.sum(),
        sum_sq_norm=squares.sum(),
        mean_sq_norm=(mean**2).sum(),
        along=Projections(sequences, tuple(g @ direction), float(direction @ direction)),
        workers=WorkerProducts(sequences, g @ g.T),
        coordinates=coordinates(g, unit),
    )


def coordinates(g: Vectors, unit: int) -> Coordinates:
    variance, mean = unit * g.var(axis=0, ddof=1), g.mean(axis=0)
    edges = 2.0 ** (LOWEST_OCTAVE + np.arange(RATIO_BINS + 1) / BINS_PER_OCTAVE)
    counts, _ = np.histogram(np.clip(variance / mean**2, edges[0], edges[-1]), edges)
    return Coordinates(np.sqrt(variance).sum(), np.abs(mean).sum(), tuple(counts.astype(float)))


def decide(
    *overrides: str,
    g: Vectors,
    unit: int = 4,
    direction: Vectors | None = None,
    state: State | None = None,
    tokens: int = 1024,
) -> tuple[State, Decision]:
    """The decision after one step with these unit gradients, of the batch that `state` had requested. Without
    a cap on growth, and without averages."""
    free = ["batch.ema=0", "batch.growth_cap=1000000", "batch.max_size=1000000000"]
    composed = small(*NORM_TEST * (not any(o.startswith("batch=") for o in overrides)), *free, *overrides)
    schedule = schedule_of(composed)
    state = state or schedule.start()[0]
    batch = round_up(state.requested, composed.batch_multiple)
    done = StepDone(step=1, tokens=tokens, sequences=tokens // 128, batch=batch)
    return schedule.decide(state, done, statistics(g, unit, direction))
