"""Labelled samples in memory, and the order in which a run reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError
from pipeline.data.permutation import permute

_VALUES_AT_ONCE = 2**22

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]  # inputs [n, …] and labels [n]


@dataclass(frozen=True)
class SparseRows:
    """Rows of a matrix [n, width] that is mostly 0: row i has `values[starts[i]:starts[i + 1]]` in
    `columns`."""

    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts) - 1, self.width

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows, dense."""
        counts = self.starts[rows + 1] - self.starts[rows]
        ends = counts.cumsum()
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
            self.starts[rows] - ends + counts, counts
        )
        dense = np.zeros((len(rows), self.width), np.float32)
        dense[np.repeat(np.arange(len(rows)), counts), self.columns[places]] = self.values[places]
        return dense


@dataclass(frozen=True)
class Samples:
    """What a model sees of `inputs` x is (x − mean)·scale; labels are 0 … classes − 1."""

    inputs: NDArray[Any] | SparseRows  # [n, …]
    labels: NDArray[np.int64]  # [n]
    classes: int
    mean: float | NDArray[np.float32] = 0.0  # of a number or of each feature
    scale: float | NDArray[np.float32] = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.inputs.shape[1:])

    def at(self, indices: NDArray[np.int64]) -> Batch:
        inputs = (self.inputs[indices].astype(np.float32, copy=False) - self.mean) * self.scale
        return inputs.astype(np.float32, copy=False), self.labels[indices]


@dataclass(frozen=True)
class Split:
    """Samples to train on, and those held out."""

    train: Samples
    train_indices: NDArray[np.int64]  # of the samples that are trained on
    validation: Samples
    validation_indices: NDArray[np.int64]

    @staticmethod
    def of(train: Samples, validation: Samples) -> Split:
        return Split(train, np.arange(len(train)), validation, np.arange(len(validation)))


def hold_out(samples: Samples, fraction: float) -> Split:
    """The same samples, whatever the seeds of a run: at least one, and not all. Raises ConfigError for a
    single one."""
    count = len(samples)
    if count < 2:
        raise ConfigError(
            f"{count} sample: at least two are needed, one to train on and one to validate with"
        )
    order = permute(np.arange(count), count, seed=0, epoch=0)
    held = min(max(1, round(fraction * count)), count - 1)
    return Split(samples, np.sort(order[held:]), samples, np.sort(order[:held]))


def standardise(split: Split) -> Split:
    """Each feature, of images each channel, to mean 0 and variance 1 over the samples that are trained on;
    a constant one to 0. (A variance of each pixel would have a convolution meet another image at each
    place.)"""
    mean, deviation = _moments(split.train, split.train_indices)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)

    def of(samples: Samples) -> Samples:
        # ((x − m)·s − mean)·scale = (x − m − mean/s)·s·scale
        whole_mean, whole_scale = samples.mean + mean / samples.scale, samples.scale * scale
        return replace(samples, mean=whole_mean.astype(np.float32), scale=whole_scale.astype(np.float32))

    return replace(split, train=of(split.train), validation=of(split.validation))


def _moments(samples: Samples, indices: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each feature [width], or of each channel [channels, 1, 1].

    As distances from a value that occurs: so a constant feature has a variance of exactly 0, which a mean
    that is rounded does not give. A part of the samples at a time, because they may be sparse, or bytes.
    """
    pixels = tuple(range(2, 1 + len(samples.shape)))
    (first,), _ = samples.at(indices[:1])
    origin = first[(slice(None), *(slice(1) for _ in pixels))].astype(np.float64)
    at_once = max(1, _VALUES_AT_ONCE // first.size)
    total, squares = np.zeros_like(origin), np.zeros_like(origin)
    for part in np.split(indices, range(at_once, len(indices), at_once)):
        distances = samples.at(part)[0] - origin
        total += distances.sum((0, *pixels)).reshape(origin.shape)
        squares += np.square(distances).sum((0, *pixels)).reshape(origin.shape)
    count = len(indices) * (first.size // origin.size)
    mean = total / count
    return origin + mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))


class SampleStream:
    """Position k of the infinite stream is sample permutation(seed, epoch)[k mod n] of those at `indices`:
    the order contract of pipeline.data.stream."""

    def __init__(self, samples: Samples, indices: NDArray[np.int64], seed: int) -> None:
        self._samples, self._indices, self._seed = samples, indices, seed

    @property
    def sequences_per_epoch(self) -> int:
        return len(self._indices)

    def read(self, first: int, count: int) -> Batch:
        """Positions first … first + count − 1."""
        n = self.sequences_per_epoch
        epochs, indices = np.divmod(np.arange(first, first + count), n)
        return self._samples.at(self._indices[permute(indices, n, self._seed, epochs)])
