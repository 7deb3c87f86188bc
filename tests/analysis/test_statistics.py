from __future__ import annotations

import math

import pytest

from analysis.statistics import Estimate, estimate, paired_difference, t_factor

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
