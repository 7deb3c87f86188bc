"""The learning rate over tokens, and what the batch does to it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from pipeline.batch._interface import StepDone
from pipeline.config import Config
from pipeline.gradients.statistics import GradientStatistics
from pipeline.optim._batch_scaling import BatchScaling, Noise, gain
from pipeline.optim._learning_rate import cuts, learning_rate
from tests.batch.support import schedule_of, small, statistics
from tests.support import config

RUN = ["budget.tokens=1024000", "lr.warmup_tokens=102400", "lr.min_ratio=0.1"]


def rate(composed: Config, tokens: int, **changes: object) -> float:
    """Relative to optim.lr, with steps of 8192 tokens."""
    changed = dataclasses.replace(composed, lr=dataclasses.replace(composed.lr, **changes))
    return learning_rate(changed, step=tokens // 8192, start=tokens, step_tokens=0) / composed.optim.lr


@pytest.mark.parametrize("schedule", ["cosine", "warmup_stable_decay"])
def test_warmup_and_decay(schedule: str):
    composed = config(f"lr={schedule}", *RUN)
    assert rate(composed, 51200) == pytest.approx(0.5)
    assert rate(composed, 102400) == pytest.approx(1.0)
    assert rate(composed, 1024000) == pytest.approx(0.1)
    middle = 102400 + (1024000 - 102400) // 2
    assert rate(composed, middle) == pytest.approx(0.55 if schedule == "cosine" else 1.0)
    if schedule == "warmup_stable_decay":
        assert rate(composed, 1024000 - 102400) == pytest.approx(0.55)  # half of the last fifth
    assert rate(composed, 8192 * 5, warmup_tokens=None, warmup_steps=10) == pytest.approx(
        0.45 * rate(composed, 8192 * 5, warmup_tokens=0)
    )


def test_without_a_warmup_the_first_step_has_the_whole_rate():
    """Also one of a single labelled sample, whose middle is half a token."""
    constant = ["lr.min_ratio=1", "optim.lr=0.5"]
    in_steps = config(*constant, "lr.warmup_tokens=null", "lr.warmup_steps=0")
    assert learning_rate(in_steps, step=1, start=0, step_tokens=8192) == 0.5
    in_tokens = config(*constant, "lr.warmup_tokens=0")
    assert learning_rate(in_tokens, step=1, start=0, step_tokens=1) == 0.5


def test_decay_in_cuts_stays_above_the_smooth_one_by_less_than_a_cut():
    composed = config("lr=cosine", *RUN)
    tokens = range(102400, 1024000, 4096)
    smooth = np.array([rate(composed, t) for t in tokens])
    in_cuts = np.array([rate(composed, t, cut_factor=1.25) for t in tokens])
    assert (in_cuts >= smooth * (1 - 1e-9)).all() and (in_cuts < smooth * 1.25).all()
    levels = np.unique(np.round(np.log(in_cuts) / np.log(1.25), 9))
    assert levels.tolist() == [float(-k) for k in range(10, -1, -1)]  # 1.25^10 < 1/0.1 < 1.25^11


@pytest.mark.parametrize("budget", ["1024000", "300B"])
def test_a_decay_to_zero_ends_with_finitely_many_cuts(budget: str):
    composed = config("lr=cosine", *RUN, f"budget.tokens={budget}", "lr.min_ratio=0", "lr.cut_factor=2")
    for tokens in (composed.budget_tokens - 256, composed.budget_tokens):
        assert 0 < cuts(composed, tokens) < 100


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_rules_of_the_batch(rule: str, factor: float):
    optimizer = ["optim=sgd"] if rule == "linear" else []
    scaling = BatchScaling(config(f"lr.batch_scaling={rule}", *optimizer))
    assert scaling.factor(128, 32, Noise()) == factor
    assert scaling.factor(32, 32, Noise()) == 1.0
    assert scaling.needs is None


ADASCALE = ["batch=linear", "optim=sgd", "lr.batch_scaling=adascale"]


def test_adascale_is_the_published_gain_of_many_small_batches():
    """Johnson et al. 2020, section 4: of S batches of the first size, by their squared norms."""
    rng = np.random.default_rng(0)
    first, growth, dimensions = 8, 16, 300
    true, deviation = np.full(dimensions, 0.1), 1.5
    # Sum over draws of r's numerator and denominator with estimators from S gradients of `first` sequences.
    sigma, mu = 0.0, 0.0
    scaling, noise = BatchScaling(small(*ADASCALE)), Noise()
    for _ in range(1500):
        g = true + rng.normal(size=(growth, dimensions)) * deviation / math.sqrt(first)
        squares, mean = (g**2).sum(1).mean(), (g.mean(0) ** 2).sum()
        variance = (squares - mean) * growth / (growth - 1)
        sigma, mu = sigma + variance, mu + mean - variance / growth
        noise = scaling.observe(noise, statistics(g, first), growth * first, first)
    expected = (sigma + mu) / (sigma / growth + mu)
    exact = gain(growth, dimensions * deviation**2 / first, float(true @ true))
    assert expected == pytest.approx(exact, rel=0.02)
    assert scaling.factor(growth * first, first, noise) == pytest.approx(exact, rel=0.05)


def test_adascale_between_nothing_gained_and_linear():
    assert gain(8, variance=0.0, signal=1.0) == 1.0
    assert gain(8, variance=1.0, signal=0.0) == 8.0
    assert gain(8, variance=1.0, signal=-0.5) == 8.0  # an unlucky estimate of |G|²
    assert gain(8, variance=0.0, signal=0.0) == 1.0
    assert 1 < gain(8, variance=1.0, signal=1.0) < 8


def test_what_cannot_be_measured_changes_no_average():
    scaling, noise = BatchScaling(small(*ADASCALE)), Noise(1.0, 2.0)
    assert scaling.observe(noise, GradientStatistics(1, 8, 1.0, 1.0, 1.0), 8, 8) == noise
    schedule = schedule_of(small(*ADASCALE))
    state, first = schedule.start()
    # A schedule without needs decides as ever where the rate is what statistics are taken for.
    assert schedule.decide(state, StepDone(1, 1024, 8, 8), None)[1].reason == first.reason == "scheduled"
