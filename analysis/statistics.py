"""Means over seeds and differences between schedules, with Student t intervals.

A mean of n seeds has the 95 % interval mean ± t(n−1) · s/√n. Schedules are compared by the differences of
runs with the same seed: they read the same data in the same order, so what the seed does to both cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of n values. `half_width` of its 95 % interval is None below two values: one says nothing."""

    mean: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate | None:
    """None without values. One that is not finite makes the mean NaN: a diverged run is no run to skip."""
    n = len(values)
    if n == 0:
        return None
    if not all(math.isfinite(value) for value in values):
        return Estimate(math.nan, None, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, t_factor(n - 1) * math.sqrt(variance / n), n)


def paired_difference(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate | None:
    """Mean of value − baseline over the seeds that both have; None when they share none."""
    return estimate([values[seed] - baseline[seed] for seed in values if seed in baseline])


def t_factor(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| ≤ t) = confidence for `degrees` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _central_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _central_probability(t: float, degrees: int) -> float:
    """P(|T| ≤ t): the finite series for whole degrees (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * ((k - 1) / k)
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
