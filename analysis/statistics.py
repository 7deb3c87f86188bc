"""Means over seeds and differences between schedules: intervals, tests, and their correction for being many.

A mean of n seeds has the 95 % interval mean ± t(n−1) · s/√n. Schedules are compared by the differences of
runs with the same seed: they read the same data in the same order, so what the seed does to both cancels.

Student's t covers 95 % at every number of seeds where they scatter about normally, as losses averaged over
many tokens do, so verdicts rest on it alone. A percentile bootstrap assumes no shape, but it never leaves the
range of the values and so misses a symmetric centre at least once in 2^(n−1) times: it stands beside the t
interval from 5 seeds on and decides nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.05
CONFIDENCE = 1 - SIGNIFICANCE
BOOTSTRAP_SEEDS = 5  # with fewer, a percentile interval misses at least one time in 8
RESAMPLES = 10_000  # the share below a limit is then 2.5 % ± 0.16 %: √(0.025 · 0.975 / 10,000)


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


@dataclass(frozen=True)
class Interval:
    """A mean of another kind with its 95 % interval, which need not be symmetric."""

    mean: float
    low: float
    high: float


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


# --- the middle of the seeds -----------------------------------------------------------------------------


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the middle half of the last axis (Agarwal et al. 2021, "Deep RL at the edge of the
    statistical precipice"), for every n ≥ 1: value i of n sorted ones weighs as much as its share of the
    quantiles, (i−1)/n to i/n, has in common with ¼ to ¾. Where 4 divides n that is the published trimmed
    mean; elsewhere theirs cuts whole values, of 5 to 7 only one from each end.
    """
    n = values.shape[-1]
    weights = 2 * np.diff(np.clip(np.arange(n + 1) / n, 0.25, 0.75))
    middle: NDArray[np.float64] = np.sort(values, axis=-1) @ weights
    return middle


def interquartile(strata: Sequence[Sequence[float]]) -> Interval | None:
    """The interquartile mean of all values with its 95 % percentile bootstrap interval (Efron 1979).

    Each stratum (values that may scatter around a centre of their own) is resampled by itself, so that every
    resample holds as many of each. The same values always give the same interval. Of 5 values it covers the
    centre of a normal distribution in about 91 % of experiments, of more in more. None where a stratum has
    fewer than BOOTSTRAP_SEEDS values or one that is not finite.
    """
    groups = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not groups or any(len(g) < BOOTSTRAP_SEEDS or not np.isfinite(g).all() for g in groups):
        return None
    random = np.random.default_rng(0)
    resamples = np.concatenate([random.choice(g, (RESAMPLES, len(g))) for g in groups], axis=1)
    low, high = np.quantile(interquartile_mean(resamples), [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    return Interval(float(interquartile_mean(np.concatenate(groups))), float(low), float(high))


# --- two schedules ---------------------------------------------------------------------------------------


def paired_difference(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate | None:
    """Mean of value − baseline over the seeds that both have; None when they share none."""
    return estimate(_differences(values, baseline))


def _differences(values: Mapping[str, float], baseline: Mapping[str, float]) -> list[float]:
    return [values[seed] - baseline[seed] for seed in values if seed in baseline]


def p_value(difference: Estimate) -> float | None:
    """Two-sided p of the paired t-test: of a mean at least as far from zero where the true one is zero.

    It is below 0.05 exactly where the 95 % interval leaves out zero. Flipping the signs of the differences
    would assume less, but of n seeds it has no p below 2^(1−n): with five, 0.06, and no verdict could fall.
    """
    if difference.half_width is None:
        return None
    if difference.half_width == 0:
        return float(difference.mean == 0)
    degrees = difference.n - 1
    t = t_factor(degrees) * abs(difference.mean) / difference.half_width
    return max(1 - _central_probability(t, degrees), 0.0)  # far out the series rounds to 1 + 2⁻⁵²


def improvement(values: Mapping[str, float], baseline: Mapping[str, float]) -> Interval | None:
    """P(value < baseline) as the share of the shared seeds with the lower value; a tie counts half.

    The interval is the exact binomial one (Clopper and Pearson 1934), with ties as losses for its lower and
    as wins for its upper limit. A bootstrap of five wins in five seeds would claim 100 % to 100 %. None
    below two shared seeds.
    """
    differences = _differences(values, baseline)
    n = len(differences)
    if n < 2:
        return None
    wins, losses = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return Interval((wins + (n - wins - losses) / 2) / n, _least_share(wins, n), 1 - _least_share(losses, n))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values corrected for their number, m: the i-th smallest times m − i + 1, at least the one before
    it and at most 1 (Holm 1979). In at most 5 % of sweeps does any whose true difference is zero fall below
    0.05, however the comparisons depend on one another, as those with the same baseline do.
    """
    adjusted: dict[str, float] = {}
    least = 0.0
    for done, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        least = min(max((len(p_values) - done) * p_values[name], least), 1.0)
        adjusted[name] = least
    return adjusted


def clearly_lowest(values: Mapping[str, Mapping[str, float]]) -> str | None:
    """The name whose values, by seed, are lower than those of every other; None where one cannot be told
    from the lowest. Since the lowest is known only afterwards, the p-values of all pairs are corrected
    together (Holm)."""
    found = {name: mean.mean for name, own in values.items() if (mean := estimate(list(own.values())))}
    if len(found) < 2 or not all(map(math.isfinite, found.values())):
        return None
    lowest = min(found, key=found.__getitem__)
    p: dict[str, float] = {}
    for a, b in itertools.combinations(sorted(found), 2):
        difference = paired_difference(values[a], values[b])
        known = p_value(difference) if difference else None
        if known is not None:
            p[str(sorted((a, b)))] = known
    adjusted = holm(p)
    pairs = [str(sorted((lowest, other))) for other in found if other != lowest]
    return lowest if all(adjusted.get(pair, 1.0) < SIGNIFICANCE for pair in pairs) else None


# --- distributions ---------------------------------------------------------------------------------------


@functools.cache
def t_factor(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| ≤ t) = confidence for `degrees` degrees of freedom."""
    high = 1.0
    while _central_probability(high, degrees) < confidence:
        high *= 2
    return _where(lambda t: _central_probability(t, degrees), confidence, high)


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


def _least_share(wins: int, n: int) -> float:
    """The share at which `wins` or more of n still have a probability of 2.5 %; 0 without a win."""
    if wins == 0:
        return 0.0

    def as_many(share: float) -> float:
        return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(wins, n + 1))

    return _where(as_many, SIGNIFICANCE / 2, 1.0)


def _where(rising: Callable[[float], float], value: float, high: float) -> float:
    """The argument between 0 and `high` at which a rising function has the value, by bisection."""
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2
