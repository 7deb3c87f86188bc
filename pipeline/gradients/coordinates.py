"""Sums over the coordinates of a gradient that `statistics.Coordinates` is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.gradients.statistics import BINS_PER_OCTAVE, LOWEST_OCTAVE, RATIO_BINS, Coordinates

SIZE = 2 + RATIO_BINS


def add_coordinates(sums: Tensor, variance: Tensor, mean: Tensor, count: Tensor) -> None:
    """Adds to `sums` [SIZE], float64, coordinates with this variance of one sequence's gradient and this
    mean, [n] each, which count for so much [n]."""
    sums[0] += (variance.sqrt() * count).sum(dtype=torch.float64)
    sums[1] += (mean.abs() * count).sum(dtype=torch.float64)
    octaves = variance.log2() - 2 * mean.abs().log2()  # of the ratio itself, its square could underflow
    # 0/0: nobody has a gradient there, nor anywhere in the padding. (Left out by a count of 0: to select the
    # others would wait for the device.)
    count = count.masked_fill(octaves.isnan(), 0)
    bins = ((octaves.nan_to_num(0) - LOWEST_OCTAVE) * BINS_PER_OCTAVE).clamp(0, RATIO_BINS - 1).long()
    sums[2:].index_add_(0, bins, count.double())


def coordinates_of(sums: Sequence[float], units: int | None = None) -> Coordinates:
    """From what the ranks summed, in the order in which they sent it. `units`: of how few the variances are;
    None: of so many that the roots of their estimates are as good as without bias."""
    deviation, magnitude, *ratio_counts = sums
    if units:
        deviation /= mean_root(units)
    return Coordinates(deviation, magnitude, tuple(ratio_counts))


def mean_root(units: int) -> float:
    """E √s² / σ, where s² is the unbiased variance of so many normal numbers, as means of many sequences are:
    0.80 of two, 0.92 of four (c₄ of quality control)."""
    return math.sqrt(2 / (units - 1)) * math.exp(math.lgamma(units / 2) - math.lgamma((units - 1) / 2))
