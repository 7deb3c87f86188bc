"""Estimators against gradients whose distribution is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from pipeline.gradients.coordinates import SIZE, add_coordinates, coordinates_of
from pipeline.gradients.statistics import (
    RATIO_BINS,
    Coordinates,
    GradientStatistics,
    Projections,
    WorkerProducts,
)


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


def assert_unbiased(estimates: list[float], truth: float) -> None:
    standard_error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 3 * standard_error
    assert standard_error < 0.1 * abs(truth)  # else the line above says nothing


def test_measuring_some_units_is_unbiased():
    """The first three of six units, of unequal size, with the norm of the whole step's gradient."""
    rng = np.random.default_rng(2)
    n, sigma, mean = np.array([4, 4, 2, 4, 4, 1]), np.linspace(0.5, 1.5, 10), np.full(10, 0.3)
    variances, signals = [], []
    for _ in range(20_000):
        g = mean + sigma * rng.normal(size=(6, 10)) / np.sqrt(n)[:, None]
        whole, squares = of_units(g, n), (g[:3] ** 2).sum(axis=1)
        some = GradientStatistics(3, 19, float(n[:3] @ squares), float(squares.sum()), whole.mean_sq_norm, 10)
        variances.append(some.variance)
        signals.append(some.signal)
    assert_unbiased(variances, (sigma**2).sum())
    assert_unbiased(signals, (mean**2).sum())


def test_one_measured_unit_of_several_is_enough():
    assert math.isfinite(GradientStatistics(1, 8, 4.0, 1.0, 1.0, measured_sequences=4).variance)


def test_projections_are_unbiased():
    """dᵀΣd and the trace on d's complement, from unequal units."""
    rng = np.random.default_rng(3)
    n, sigma, mean = np.array([4, 4, 2, 1]), np.linspace(0.5, 1.5, 10), np.full(10, 0.3)
    d = np.linspace(-1, 2, 10)
    along, orthogonal = [], []
    for _ in range(20_000):
        g = mean + sigma * rng.normal(size=(4, 10)) / np.sqrt(n)[:, None]
        projections = Projections(tuple(n), tuple(g @ d), float(d @ d))
        assert projections.mean == pytest.approx(n @ g @ d / n.sum())
        statistics = dataclasses.replace(of_units(g, n), along=projections)
        along.append(projections.variance)
        orthogonal.append(statistics.orthogonal_variance)
    true_along = (sigma**2 * d**2).sum()
    assert_unbiased(along, true_along)
    assert_unbiased(orthogonal, (sigma**2).sum() - true_along / (d @ d))


def test_worker_products_are_the_papers_sums():
    """Written out over the gradients themselves: Bollapragada et al. 2018, eq. 2.6 and 3.3, weighted."""
    rng = np.random.default_rng(4)
    g, n = rng.normal(size=(5, 20)) + 0.2, np.array([4, 4, 2, 4, 3])
    products = WorkerProducts(tuple(n), g @ g.T)
    mean = n @ g / n.sum()
    assert products.with_mean == pytest.approx(g @ mean)
    parallel = sum(n[j] * (g[j] @ mean - mean @ mean) ** 2 for j in range(5)) / 4
    assert products.inner_product_variance == pytest.approx(parallel)
    residuals = [g[j] - (g[j] @ mean) / (mean @ mean) * mean for j in range(5)]
    orthogonal = sum(n[j] * (residuals[j] ** 2).sum() for j in range(5)) / 4
    assert products.orthogonal_variance == pytest.approx(orthogonal)
    # Both parts together are the variance (Espath et al. 2021), up to ‖g‖² of the in-sample mean.
    assert orthogonal + parallel / (mean @ mean) == pytest.approx(of_units(g, n).variance)
    assert math.isnan(products.unbiased_inner_product_variance)  # unequal batches


def test_gram_matrix_gives_an_unbiased_inner_product_variance_and_the_papers_is_biased():
    rng = np.random.default_rng(5)
    sigma, mean, n = np.linspace(0.5, 1.5, 30), np.full(30, 0.5), 4
    unbiased, in_sample = [], []
    for _ in range(20_000):
        g = mean + sigma * rng.normal(size=(6, 30)) / math.sqrt(n)
        products = WorkerProducts((n,) * 6, g @ g.T)
        unbiased.append(products.unbiased_inner_product_variance)
        in_sample.append(products.inner_product_variance)
    truth = (sigma**2 * mean**2).sum()
    assert_unbiased(unbiased, truth)
    assert np.mean(in_sample) > 1.1 * truth
    assert math.isnan(WorkerProducts((4,) * 3, np.eye(3)).unbiased_inner_product_variance)


@pytest.mark.parametrize("units", [2, 4, 16])
def test_deviations_of_few_units_have_no_bias(units: int):
    """Σ σ_k of single sequences, from the means of 32 of them on each of so many ranks."""
    rng = np.random.default_rng(6)
    sigma = rng.uniform(0.5, 2.0, 100_000)
    g = torch.from_numpy(rng.normal(size=(units, len(sigma))) * sigma / math.sqrt(32))
    sums = torch.zeros(SIZE, dtype=torch.float64)
    add_coordinates(sums, 32 * g.var(0), g.mean(0), torch.ones(len(sigma)))
    assert coordinates_of(sums.tolist(), units).sum_deviation == pytest.approx(sigma.sum(), rel=0.02)


def test_ratio_quantile_bounds_from_above():
    counts = [0.0] * RATIO_BINS
    counts[160], counts[164], counts[168] = 5.0, 4.0, 1.0  # ratios of 1 to 2^¼, 2 to 2^1¼, 4 to 2^2¼
    coordinates = Coordinates(1.0, 1.0, tuple(counts))
    quantiles = [coordinates.ratio_quantile(share) for share in (0.1, 0.5, 0.51, 0.9, 1.0)]
    assert quantiles == pytest.approx([2**0.25, 2**0.25, 2**1.25, 2**1.25, 2**2.25])
    counts[-1] = 1.0  # a coordinate without signal
    assert Coordinates(1.0, 1.0, tuple(counts)).ratio_quantile(1.0) == math.inf
    assert math.isnan(Coordinates(0.0, 0.0, (0.0,) * RATIO_BINS).ratio_quantile(0.5))
