from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from analysis.statistics import (
    Estimate,
    Interval,
    clearly_lowest,
    estimate,
    holm,
    improvement,
    interquartile,
    interquartile_mean,
    p_value,
    paired_difference,
    t_factor,
)

# Two-sided 95 % points of Student's t, from the printed tables.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    9: 2.262,
    10: 2.228,
    30: 2.042,
    120: 1.980,
}


@pytest.mark.parametrize(("degrees", "t"), TABLE.items())
def test_t_factor_is_the_tabulated_one(degrees: int, t: float) -> None:
    assert t_factor(degrees) == pytest.approx(t, abs=0.0005)


def test_other_confidences() -> None:
    assert t_factor(4, 0.99) == pytest.approx(4.604, abs=0.0005)
    assert t_factor(1, 0.5) == pytest.approx(1.0)  # the quartile of the Cauchy distribution


def test_mean_of_three_seeds_by_hand() -> None:
    found = estimate([1.0, 2.0, 4.0])  # deviations −4/3, −1/3, 5/3: s² = 7/3, s/√3 = 0.88192
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.half_width == pytest.approx(4.30265 * 0.8819171, rel=1e-5)
    assert (found.low, found.high) == (
        pytest.approx(7 / 3 - 3.794583, abs=1e-4),
        pytest.approx(7 / 3 + 3.794583, abs=1e-4),
    )


def test_one_value_has_no_interval() -> None:
    assert estimate([2.5]) == Estimate(2.5, None, 1)
    assert estimate([2.5]).low is None  # type: ignore[union-attr]
    assert estimate([]) is None


def test_a_diverged_run_leaves_no_mean() -> None:
    found = estimate([2.0, math.nan, 2.1])
    assert found is not None and math.isnan(found.mean) and found.half_width is None and found.n == 3
    found = estimate([2.0, math.inf])
    assert found is not None and not math.isfinite(found.mean)


def test_pairing_by_seed_removes_what_the_seed_does() -> None:
    """The schedules differ by 0.010 and 0.012 within a seed and by 1 between seeds."""
    baseline, better = {"0": 2.0, "1": 3.0, "9": 7.0}, {"1": 2.988, "0": 1.990, "5": 0.0}
    found = paired_difference(better, baseline)
    assert found is not None and found.n == 2
    assert found.mean == pytest.approx(-0.011)
    assert found.half_width == pytest.approx(12.7062 * 0.001, rel=1e-4)
    assert paired_difference({"0": 1.0}, {"1": 1.0}) is None


# --- the middle of the seeds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "middle"),
    [
        ([7.0], 7.0),
        ([1.0, 4.0], 2.5),
        (
            [9.0, 1.0, 2.0],
            (1 + 4 * 2 + 9) / 6,
        ),  # thirds, of which the outer two lose ¼ each: 1/12, 4/12, 1/12
        ([1.0, 100.0, 3.0, -50.0], 2.0),
        ([1.0, 2.0, 4.0, 8.0, 99.0], 0.3 * 2 + 0.4 * 4 + 0.3 * 8),  # fifths: 0, 0.15, 0.2, 0.15, 0 of ½
        (
            [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0],
            (3 + 5 + 8 + 13) / 4,
        ),  # as published: cut ¼ on each side
    ],
)
def test_the_interquartile_mean_by_hand(values: list[float], middle: float) -> None:
    assert float(interquartile_mean(np.array(values))) == pytest.approx(middle)


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    """All 5⁵ of them, enumerated: the limits cut off 2.5 % on each side."""
    values = [2.03, 2.11, 2.17, 2.24, 2.90]
    means = sorted(
        0.3 * a + 0.4 * b + 0.3 * c for _, a, b, c, _ in map(sorted, itertools.product(values, repeat=5))
    )
    found = interquartile([values])
    assert found is not None and found.mean == pytest.approx(0.3 * 2.11 + 0.4 * 2.17 + 0.3 * 2.24)
    assert found.low == pytest.approx(means[math.ceil(0.025 * 5**5) - 1], abs=0.005)
    assert found.high == pytest.approx(means[math.ceil(0.975 * 5**5) - 1], abs=0.05)
    assert means[0] < found.low < found.high < means[-1]


def test_a_report_written_again_says_the_same() -> None:
    values = [math.sqrt(i) for i in range(12)]  # so many different resamples that chance hits no limit twice
    assert interquartile([values]) == interquartile([values])


def test_each_stratum_is_resampled_by_itself() -> None:
    """Two settings without any scatter: only a resampling across them could make an interval."""
    assert interquartile([[1.0] * 5, [3.0] * 5]) == Interval(2.0, 2.0, 2.0)
    pooled = interquartile([[1.0] * 5 + [3.0] * 5])
    assert pooled is not None and pooled.low < 1.5 < 2.5 < pooled.high


@pytest.mark.parametrize("strata", [[], [[1.0] * 4], [[1.0] * 9, [1.0] * 4], [[1.0] * 9 + [math.nan]]])
def test_too_few_or_diverged_seeds_have_no_bootstrap(strata: list[list[float]]) -> None:
    assert interquartile(strata) is None


def test_coverage() -> None:
    """Why the t interval decides: it holds the true mean in 95 % of experiments, with 2 seeds as with 5.

    A bootstrap's stays inside the range of the values, which holds it in 1 − 2^(1−n) of them.
    """
    normal = random.Random(7)
    for n in (2, 3, 5):
        samples = [[normal.gauss(0, 1) for _ in range(n)] for _ in range(1000)]
        within = share(min(sample) <= 0 <= max(sample) for sample in samples)
        assert within == pytest.approx(1 - 2 ** (1 - n), abs=0.04)  # 3 √(0.25 / 1000) = 0.047
        assert share(covers(estimate(sample)) for sample in samples) == pytest.approx(0.95, abs=0.02)
    assert 0.86 < share(covers(interquartile([sample])) for sample in samples[:200]) < within


def covers(found: Estimate | Interval | None) -> bool:
    assert found is not None and found.low is not None and found.high is not None
    return found.low <= 0 <= found.high


def share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


# --- two schedules ---------------------------------------------------------------------------------------


def p_at(t: float, degrees: int) -> float:
    """Of a difference so many standard errors from zero."""
    found = p_value(Estimate(-t, t_factor(degrees), degrees + 1))
    assert found is not None
    return found


def p_of(differences: Sequence[float]) -> float:
    found = estimate(differences)
    p = None if found is None else p_value(found)
    assert p is not None
    return p


@pytest.mark.parametrize(
    ("degrees", "t", "p"),
    [
        (1, 3.0, 1 - 2 / math.pi * math.atan(3.0)),
        (2, 3.0, 1 - 3 / math.sqrt(2 + 9)),
        (4, 2.776, 0.05),
        (4, 4.604, 0.01),
        (9, 4.781, 0.001),
        (30, 2.750, 0.01),
        (7, 0.0, 1.0),
    ],
)
def test_p_values_are_those_of_the_tables(degrees: int, t: float, p: float) -> None:
    assert p_at(t, degrees) == pytest.approx(p, rel=0.002)


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 8, 19])
@pytest.mark.parametrize("t", [0.3, 1.7, 6.0])
def test_p_values_are_the_tails_of_the_density(degrees: int, t: float) -> None:
    """Γ((ν+1)/2) / (√(νπ) Γ(ν/2)) · (1 + x²/ν)^(−(ν+1)/2), summed from −t to t."""
    constant = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    x = (np.arange(20_000) + 0.5) / 20_000 * t
    inside = 2 * t * float(np.mean(constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)))
    assert p_at(t, degrees) == pytest.approx(1 - inside, abs=1e-8)


def test_a_p_below_5_percent_is_an_interval_without_zero() -> None:
    for degrees in (1, 2, 4, 11):
        edge = t_factor(degrees)
        assert p_at(1.0001 * edge, degrees) < 0.05 < p_at(0.9999 * edge, degrees)


def test_p_where_nothing_scatters() -> None:
    assert p_value(Estimate(0.0, 0.0, 3)) == 1.0
    assert p_value(Estimate(-0.1, 0.0, 3)) == 0.0
    assert p_value(Estimate(-0.1, 1e-300, 2)) == 0.0
    assert p_value(Estimate(-0.1, None, 1)) is None
    assert p_at(5411.6952654646375, 6) == 0.0  # here the series rounds to 1 + 2⁻⁵²


def test_the_t_test_agrees_with_all_sign_flips_and_can_decide_where_they_cannot() -> None:
    """If the schedules are alike, each difference could as well have the other sign."""
    differences = [0.9, 1.4, -0.3, 0.2, 1.1, -0.6, 0.8, 0.1, 1.6, -0.4, 0.5, 0.7]
    assert p_of(differences) == pytest.approx(flips(differences), rel=0.15)
    assert 0.01 < flips(differences) < 0.05
    five = [-0.101, -0.100, -0.102, -0.099, -0.103]
    assert flips(five) == 2 / 2**5
    assert p_of(five) < 1e-6


def flips(differences: list[float]) -> float:
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(sign, differences, strict=True))) for sign in signs]
    return share(found >= abs(sum(differences)) - 1e-12 for found in sums)


def seeds(*losses: float) -> dict[str, float]:
    return {str(seed): loss for seed, loss in enumerate(losses)}


def test_the_probability_of_improvement_counts_seeds_and_half_of_ties() -> None:
    """Of 4 shared seeds 2 wins, 1 tie, 1 loss: 5/8, no less than 2 of 4 and no more than 3 of 4 allow."""
    found = improvement(seeds(1.9, 2.0, 2.0, 2.3, 1.0), seeds(2.0, 2.1, 2.0, 2.2))
    assert found is not None and found.mean == 5 / 8
    assert (found.low, found.high) == (pytest.approx(0.0676, abs=1e-4), pytest.approx(0.9937, abs=1e-4))
    assert improvement(seeds(1.0), seeds(2.0, 3.0)) is None


def test_limits_of_a_share_by_hand() -> None:
    """All of n: the lower limit is the share p with pⁿ = 2.5 %. None: its mirror image."""
    for n in (2, 5, 9):
        better = improvement(seeds(*[1.0] * n), seeds(*[2.0] * n))
        worse = improvement(seeds(*[2.0] * n), seeds(*[1.0] * n))
        least = 0.025 ** (1 / n)
        assert better == Interval(1.0, pytest.approx(least), 1.0)
        assert worse == Interval(0.0, 0.0, pytest.approx(1 - least))


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_interval_of_a_share_covers_whatever_is_true(n: int) -> None:
    """Exactly, over all numbers of wins. A bootstrap of a share near 1 has no width most of the time."""
    found = [improvement(seeds(*[-1.0] * k, *[1.0] * (n - k)), seeds(*[0.0] * n)) for k in range(n + 1)]
    for truth in np.linspace(0.01, 0.99, 99):
        held = [
            math.comb(n, k) * truth**k * (1 - truth) ** (n - k)
            for k, i in enumerate(found)
            if i and i.low <= truth <= i.high
        ]
        assert sum(held) >= 0.95, truth


def test_holm_by_hand() -> None:
    """4 · 0.005, 3 · 0.01, 2 · 0.03 and 1 · 0.04, which may not fall below the one before."""
    found = holm({"1": 0.01, "2": 0.04, "3": 0.03, "4": 0.005})
    assert found == {
        name: pytest.approx(p) for name, p in {"4": 0.02, "1": 0.03, "3": 0.06, "2": 0.06}.items()
    }
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_is_closed_testing_with_bonferroni() -> None:
    """Rejected is what Bonferroni rejects in every set of hypotheses that holds it: all sets, enumerated."""
    numbers = random.Random(3)
    p = {str(i): numbers.random() ** 3 for i in range(6)}
    sets = [s for size in range(1, 7) for s in itertools.combinations(p, size)]
    for name, found in holm(p).items():
        assert found == pytest.approx(max(min(1, len(s) * min(p[o] for o in s)) for s in sets if name in s))


def test_holm_errs_in_5_percent_of_sweeps() -> None:
    """Six schedules without any effect against a shared baseline, three seeds: uncorrected, far more err."""
    normal = random.Random(11)
    raw, corrected = [], []
    for _ in range(1500):
        baseline, *others = ([normal.gauss(0, 1) for _ in range(3)] for _ in range(7))
        p = {
            str(i): p_of([a - b for a, b in zip(own, baseline, strict=True)]) for i, own in enumerate(others)
        }
        raw.append(min(p.values()) < 0.05)
        corrected.append(min(holm(p).values()) < 0.05)
    assert share(raw) > 0.15
    assert 0.02 < share(corrected) < 0.065


def test_the_lowest_is_clear_only_against_every_other() -> None:
    """Differences of −1 ± 0.1 in three seeds have t = 17.3, p = 0.0033, and three pairs are corrected for."""
    low, near, far = seeds(1.0, 2.0, 3.0), seeds(1.9, 3.0, 4.1), seeds(2.1, 3.3, 3.9)
    assert clearly_lowest({"near": near, "low": low}) == "low"
    assert clearly_lowest({"far": far, "near": near, "low": low}) == "low"
    assert clearly_lowest({"far": far, "near": near}) is None
    assert clearly_lowest({"low": low, "level": seeds(1.3, 1.8, 3.0), "far": far}) is None
    p = p_of([-1.0, -1.4, -0.7])
    assert p < 0.05 < 3 * p  # alone it would be clear; as one of three pairs it is not
    wide, other = seeds(2.0, 3.4, 3.7), seeds(2.0, 3.41, 3.69)
    assert clearly_lowest({"low": low, "wide": wide}) == "low"
    assert clearly_lowest({"low": low, "wide": wide, "other": other}) is None


def test_no_lowest_without_seeds_to_tell() -> None:
    assert clearly_lowest({}) is None
    assert clearly_lowest({"a": seeds(1.0, 2.0)}) is None  # there is nothing to tell it from
    assert clearly_lowest({"a": seeds(1.0), "b": seeds(2.0)}) is None
    assert clearly_lowest({"a": {"0": 1.0, "1": 1.1}, "b": {"2": 2.0, "3": 2.1}}) is None
    assert clearly_lowest({"a": seeds(1.0, 1.1), "b": seeds(2.0, math.nan)}) is None
