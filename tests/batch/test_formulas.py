"""What each test demands, recomputed from the gradients themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.batch._interface import StepDone
from pipeline.gradients.statistics import GradientStatistics, SampleProducts
from tests.batch.support import (
    ADAPTIVE,
    SAMPLES,
    coordinates,
    decide,
    gradients,
    schedule_of,
    small,
    statistics,
)

UNIT = 4  # sequences


def demand(*overrides: str, g: np.ndarray, direction: np.ndarray | None = None) -> float:
    return decide(*overrides, g=g, direction=direction)[1].log["test/statistic"]


def trace(g: np.ndarray) -> float:
    """Unbiased tr Σ of one sequence."""
    return UNIT * ((g - g.mean(0)) ** 2).sum() / (len(g) - 1)


@pytest.mark.parametrize("estimator", ["microbatch", "worker"])
def test_norm_test_is_equation_3(estimator: str):
    """Lau et al. 2024, eq. 3, with the batch rounded up to a multiple (Algorithm 1)."""
    g = gradients()
    expected = trace(g) / (0.7**2 * (g.mean(0) ** 2).sum())
    _, decision = decide("parallel=ddp", f"batch.estimator={estimator}", "batch.eta=0.7", g=g)
    assert decision.log["test/statistic"] == pytest.approx(expected)
    assert decision.requested == pytest.approx(expected)
    assert decision.size == math.ceil(expected / 8) * 8
    assert decision.reason == "grew"


def test_paper_estimator_is_equation_5_as_printed():
    g = gradients(units=2)
    printed = ((g - g.mean(0)) ** 2).sum(axis=1).mean() / (0.2**2 * (g.mean(0) ** 2).sum())
    assert demand("parallel=ddp", "batch.estimator=paper", "batch.eta=0.2", g=g) == pytest.approx(printed)


def test_debiased_signal_subtracts_the_noise_of_the_mean():
    g = gradients(signal=3.0)
    signal = (g.mean(0) ** 2).sum() - trace(g) / (UNIT * len(g))
    expected = trace(g) / signal
    assert demand("batch.signal=debiased", "batch.eta=1", g=g) == pytest.approx(expected)


def test_noise_scale_is_b_simple_over_c_squared():
    """McCandlish et al. 2018, appendix A.1, from a small and a big batch: here one unit and all of them."""
    g = gradients(signal=3.0)
    small_batch, big_batch = UNIT, UNIT * len(g)
    small_norm, big_norm = (g**2).sum(1).mean(), (g.mean(0) ** 2).sum()
    signal = (big_batch * big_norm - small_batch * small_norm) / (big_batch - small_batch)
    noise = (small_norm - big_norm) / (1 / small_batch - 1 / big_batch)
    assert demand("batch=noise_scale", g=g) == pytest.approx(noise / signal)
    assert demand("batch=noise_scale", "batch.c=0.6", g=g) == pytest.approx(noise / signal / 0.36)
    plain = demand("batch=noise_scale", "batch.c=0.6", "batch.signal=plain", g=g)
    assert plain == pytest.approx(noise / big_norm / 0.36)
    assert plain == pytest.approx(demand("batch=norm_test", "batch.eta=0.6", g=g))


def test_noise_scale_of_sign_methods():
    """Naganuma et al. 2026: (Σ σ_k)²/‖g‖₁² over coordinates, / c²."""
    g = gradients(units=2)
    deviation = np.sqrt(UNIT * g.var(axis=0, ddof=1)).sum()
    expected = (deviation / np.abs(g.mean(0)).sum()) ** 2 / 0.6**2
    assert demand(*ADAPTIVE["noise_scale l1"], "batch.c=0.6", g=g) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_coordinate_norm_test_asks_for_a_quantile_of_the_coordinates(share: float):
    g = gradients(units=4, signal=30.0)
    ratios = np.sort(UNIT * g.var(axis=0, ddof=1) / g.mean(0) ** 2)
    quantile = ratios[math.ceil(share * len(ratios)) - 1]
    demanded = demand(*ADAPTIVE["coordinate_norm_test"], "batch.eta=0.1", f"batch.share={share}", g=g)
    assert quantile / 0.01 <= demanded <= 1.2 * quantile / 0.01


def test_a_coordinate_without_gradient_demands_the_cap_and_no_more():
    g = gradients(units=2)
    g[:, 7] = [1.0, -1.0]
    overrides = [*ADAPTIVE["coordinate_norm_test"], "batch.share=1", "batch.max_size=512"]
    assert demand(*overrides, g=g) == 512


@pytest.mark.parametrize(("theta", "nu"), [(0.9, 5.84), (0.05, 1.0), (0.2, 0.5)])
def test_in_sample_inner_product_test_is_that_of_the_paper(theta: float, nu: float):
    """Bollapragada et al. 2018, eq. 2.6 and 3.3, on the means of units: their variance is 1/UNIT."""
    g = gradients(units=6, signal=2.0)
    mean = g.mean(0)
    squared = mean @ mean
    along = UNIT * ((g @ mean - squared) ** 2).sum() / (len(g) - 1)
    residuals = g - np.outer(g @ mean / squared, mean)
    across = UNIT * (residuals**2).sum() / (len(g) - 1)
    expected = max(along / (theta**2 * squared**2), across / (nu**2 * squared))
    overrides = [*ADAPTIVE["inner_product in sample"], f"batch.theta={theta}", f"batch.nu={nu}"]
    assert demand(*overrides, g=g) == pytest.approx(expected)


@pytest.mark.parametrize(("theta", "nu"), [(0.9, 5.84), (0.2, 0.5)])
def test_of_single_samples_it_is_that_of_the_paper_exactly(theta: float, nu: float):
    """Ibid., from the sums that samples give: of squared norms, of products with the mean and of their squares."""
    g = gradients(units=20, signal=2.0)
    mean = g.mean(0)
    squared, products, squares = mean @ mean, g @ mean, (g**2).sum()
    along = ((products - squared) ** 2).sum() / (len(g) - 1)
    across = ((g - np.outer(products / squared, mean)) ** 2).sum() / (len(g) - 1)
    expected = max(along / (theta**2 * squared**2), across / (nu**2 * squared))
    overrides = [*SAMPLES, "batch=inner_product", "batch.direction=in_sample", "batch.ema=0"]
    schedule = schedule_of(small(*overrides, f"batch.theta={theta}", f"batch.nu={nu}"))
    sums = SampleProducts(len(g), products.sum(), (products**2).sum(), squared)
    seen = GradientStatistics(len(g), len(g), squares, squares, squared, along=sums)
    _, decision = schedule.decide(schedule.start()[0], StepDone(1, 20, 20, 20), seen)
    assert decision.log["test/statistic"] == pytest.approx(expected)


def test_inner_product_test_along_a_direction():
    g = gradients(units=6, signal=2.0)
    direction = np.random.default_rng(5).normal(size=50)
    unit_vector = direction / np.linalg.norm(direction)
    along = UNIT * (g @ unit_vector).var(ddof=1)
    across = UNIT * (g - np.outer(g @ unit_vector, unit_vector)).var(axis=0, ddof=1).sum()
    squared = (g.mean(0) ** 2).sum()
    overrides = ["batch=inner_product", "batch.theta=0.1", "batch.nu=0.5"]
    _, decision = decide(*overrides, g=g, direction=direction)
    assert decision.log["test/statistic"] == pytest.approx(
        max(along / (0.01 * squared), across / (0.25 * squared))
    )
    # What the batch of 8 sequences would just have passed with.
    assert decision.log["test/theta_eff"] == pytest.approx(math.sqrt(along / (8 * squared)))
    assert decision.log["test/nu_eff"] == pytest.approx(math.sqrt(across / (8 * squared)))


@pytest.mark.parametrize("direction", ["momentum", "in_sample"])
def test_the_best_split_of_epsilon_asks_for_the_norm_tests_batch_and_every_other_for_more(direction: str):
    """Espath et al. 2021."""
    g = gradients(units=4)
    # In the sample the two parts add up to the variance of all, as they do along any direction.
    norm_test = demand("batch=norm_test", "batch.eta=0.7", g=g)
    overrides = ["batch=inner_product", f"batch.direction={direction}", "parallel=ddp"]
    nulls = ["batch.theta=null", "batch.nu=null"]
    best = demand(*overrides, *nulls, "batch.epsilon=0.7", g=g)
    assert best == pytest.approx(norm_test)

    log = decide(*overrides, g=g)[1].log
    share = log["test/theta_eff"] ** 2 / (log["test/theta_eff"] ** 2 + log["test/nu_eff"] ** 2)
    demands = []
    for split in (share / 4, share / 1.2, share, (1 + share) / 2):
        theta, nu = 0.7 * math.sqrt(split), 0.7 * math.sqrt(1 - split)
        demands.append(demand(*overrides, f"batch.theta={theta}", f"batch.nu={nu}", g=g))
    assert demands[2] == pytest.approx(norm_test)
    assert all(other > 1.01 * norm_test for other in demands[:2] + demands[3:])


def test_what_the_in_sample_form_measures():
    """Noise with variance 9 along G (‖G‖ = 1) and 1 across it, in batches of mostly noise. ⟨g_j, g⟩ contains
    ‖g_j‖²/J, so its variance is far above GᵀΣG = 9; and along g/‖g‖ it is that of the noise's own axes."""
    rng = np.random.default_rng(1)
    true, deviation = np.eye(400)[0], np.r_[3.0, np.ones(399)]
    products, in_sample, unbiased = [], [], []
    for _ in range(400):
        g = true + rng.normal(size=(8, 400)) * deviation / math.sqrt(UNIT)
        statistic = statistics(g, UNIT, direction=true)
        assert statistic.workers
        products.append(statistic.workers.inner_product_variance)
        in_sample.append(statistic.workers.parallel_variance)
        unbiased.append(statistic.parallel_variance)
    assert np.mean(unbiased) == pytest.approx(9.0, rel=0.1)
    assert np.mean(products) > 15.0
    assert np.mean(in_sample) < 3.0


@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_single_steps_show_is_averaged_before_it_is_divided(name: str):
    composed = small(*ADAPTIVE[name], "batch.ema=0.9", "batch.max_size=100000")
    schedule = schedule_of(composed)
    state, _ = schedule.start()
    averages = None
    for step in range(1, 6):
        s = statistics(gradients(seed=step), UNIT)
        state, decision = schedule.decide(state, StepDone(step, 1, 1, 32), s)
        terms = np.array(schedule.terms(s))
        averages = 0.1 * terms if averages is None else 0.9 * averages + 0.1 * terms
        corrected = tuple(averages / (1 - 0.9**step))
        assert decision.log["test/statistic"] == pytest.approx(schedule.demand(corrected))


def test_no_signal_left_demands_the_cap_and_nan_changes_nothing():
    flat = np.stack([np.ones(4), -np.ones(4)])
    assert decide("batch.max_size=64", g=flat)[1].reason == "capped"
    lost = GradientStatistics(1, 8, 1.0, 1.0, 1.0)  # one unit: variance undefined
    schedule = schedule_of(small("batch=norm_test", "batch.ema=0.9"))
    state, _ = schedule.start()
    after, decision = schedule.decide(state, StepDone(1, 1, 1, 8), lost)
    assert decision.reason == "unmeasured"
    assert after == state


def test_the_histogram_of_the_support_is_that_of_the_capture():
    """8 coordinates with known ratios: the quantile bounds each from above, by less than a quarter octave."""
    g = np.array([[1.0, 2.0, 4.0, 8.0], [3.0, 4.0, 6.0, 10.0]])
    ratios = sorted(UNIT * g.var(axis=0, ddof=1) / g.mean(0) ** 2)
    for index, ratio in enumerate(ratios):
        bound = coordinates(g, UNIT).ratio_quantile((index + 1) / 4)
        assert ratio <= bound <= ratio * 2**0.25 * (1 + 1e-12)
