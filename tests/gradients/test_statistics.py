"""Estimators against gradients whose distribution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.gradients.statistics import GradientStatistics


def of_units(gradients: np.ndarray, weights: np.ndarray) -> GradientStatistics:
    """From unit mean gradients [units, parameters] of `weights` sequences each."""
    mean = weights @ gradients / weights.sum()
    squares = (gradients**2).sum(axis=1)
    return GradientStatistics(
        len(gradients), int(weights.sum()), float(weights @ squares), float(squares.sum()), float(mean @ mean)
    )


@pytest.mark.parametrize("weights", [[4] * 8, [8, 8, 8, 1], [3, 5]])
def test_unbiased_whatever_the_sizes_of_the_units(weights: list[int]):
    """Averaged over many draws: tr Σ and |G|² of one sequence, from means of n_j sequences."""
    rng = np.random.default_rng(0)
    n = np.array(weights)
    true_mean, sigma = np.full(10, 0.2), np.linspace(0.5, 1.5, 10)
    draws = [
        of_units(true_mean + sigma * rng.normal(size=(len(n), 10)) / np.sqrt(n)[:, None], n)
        for _ in range(20_000)
    ]
    variances, signals = [d.variance for d in draws], [d.signal for d in draws]
    for estimates, truth in ((variances, (sigma**2).sum()), (signals, (true_mean**2).sum())):
        standard_error = np.std(estimates) / math.sqrt(len(estimates))
        assert abs(np.mean(estimates) - truth) < 4 * standard_error


def test_equal_units_give_the_sum_of_squared_deviations():
    rng = np.random.default_rng(1)
    g = rng.normal(size=(6, 30))
    s = of_units(g, np.full(6, 4))
    deviations = ((g - g.mean(0)) ** 2).sum()
    assert s.variance == pytest.approx(4 * deviations / 5)
    assert s.signal == pytest.approx((g.mean(0) ** 2).sum() - deviations / 30)
    assert s.population_variance == pytest.approx(deviations / 6)
    assert s.noise_scale == pytest.approx(s.variance / s.signal)


def test_undefined_is_nan():
    assert math.isnan(GradientStatistics(1, 8, 8.0, 1.0, 1.0).variance)
    no_signal = of_units(np.array([[1.0], [-1.0]]), np.array([4, 4]))
    assert no_signal.signal < 0 and math.isnan(no_signal.noise_scale)
