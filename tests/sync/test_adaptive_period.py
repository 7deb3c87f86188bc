"""Adaptive periodic averaging, its periods and models computed again from a log of everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.sync.adaptive_period import adapted
from tests.support import config
from tests.sync.resume import assert_same_from_step_8, resumed_after_7_steps
from tests.sync.trial import RATE, Log, trial


@pytest.mark.parametrize(
    ("variance", "following"), [(0.69, 5), (0.71, 4), (1.0, 4), (1.29, 4), (1.31, 3), (0.0, 5)]
)
def test_the_period_follows_the_variance(variance: float, following: int):
    assert adapted(4, variance, 1.0) == following


def test_the_period_is_never_below_one():
    assert adapted(1, 10.0, 1.0) == 1


def replayed(
    logs: Sequence[Log],
    period: int,
    sample_steps: int,
    factor: float | None = None,
    variance: float = 0.0,
    first: int = 1,
) -> tuple[list[int], list[float], np.ndarray]:
    """Periods and variances after every step, and models [ranks, steps, n]. `factor`, `variance`: C₂ and the
    last S, known already."""
    ranks, steps = len(logs), len(logs[0].own)
    models = np.array([log.own for log in logs], dtype=np.float64)
    periods, variances, ratios = [], [], [factor] if factor else []
    following = first - 1 + period
    for index in range(steps):
        step = first + index
        if step == following:
            mean = models[:, index].mean(axis=0)
            variance = np.square(models[:, index] - mean).sum() / ranks
            models[:, index] = mean
            if step <= sample_steps:
                ratios.append(variance / RATE)
            elif variance < 0.7 * RATE * np.mean(ratios):
                period += 1
            elif variance > 1.3 * RATE * np.mean(ratios):
                period = max(1, period - 1)
            following = step + period
        periods.append(period)
        variances.append(variance)
    return periods, variances, models


def assert_as_replayed(logs: Sequence[Log], expected: tuple[list[int], list[float], np.ndarray]) -> None:
    periods, variances, models = expected
    for log in logs:
        assert [row["period"] for row in log.observed] == periods
        np.testing.assert_allclose([row["variance"] for row in log.observed], variances, rtol=1e-4)
    found = np.array([log.after for log in logs])
    np.testing.assert_allclose(found, models, rtol=1e-5, atol=1e-6)
    met = 1 + np.flatnonzero(np.diff(variances))  # steps that ended with a synchronisation
    assert len(met) > 3 and (found[:, met] == found[:1, met]).all()  # to the bit


@pytest.mark.parametrize("ranks", [4, 8])
def test_the_first_steps_are_local_sgd_and_set_the_measure(ranks: int):
    settings = ("sync.period=4", "sync.sample_steps=16")
    logs = trial(ranks, "sync=adaptive_period", *settings, steps=30, step_s=0.001)
    expected = replayed(logs, 4, 16)
    assert_as_replayed(logs, expected)
    _, variances, _ = expected
    for log in logs:
        assert log.state
        _, _, factor, samples, _ = log.state[1]["adaptive"].tolist()
        assert samples == 4 and factor == pytest.approx(np.mean(variances[3:16:4]) / RATE, rel=1e-5)
    local = trial(ranks, "sync=local_sgd", "sync.period=4", steps=16, step_s=0.001)
    for rank in range(ranks):
        np.testing.assert_array_equal(logs[rank].after[:16], local[rank].after)


@pytest.mark.parametrize(("scale", "rises"), [(0.3, False), (3.0, True)])
def test_the_period_moves_until_the_variance_is_what_was_wanted(scale: float, rises: bool):
    """With C₂ made smaller or larger than what period 4 has brought."""
    settings = ("sync=adaptive_period", "sync.period=4", "sync.sample_steps=16")
    before = trial(4, *settings, steps=16, step_s=0.001)
    saved = []
    for log in before:
        assert log.state
        weights, state = log.state
        period, following, factor, *others = state["adaptive"].tolist()
        assert (period, following) == (4, 20)
        numbers = torch.tensor([period, following, scale * factor, *others], dtype=torch.float64)
        saved.append((weights, {"adaptive": numbers}))
    after = trial(4, *settings, steps=50, step_s=0.001, saved=saved, first=17)
    variance = before[0].observed[-1]["variance"]
    expected = replayed(after, 4, 16, factor=scale * factor, variance=variance, first=17)
    assert_as_replayed(after, expected)
    periods, variances, _ = expected
    assert periods[-1] >= 6 if rises else periods[-1] <= 3
    assert 0.6 < variances[-1] / (scale * factor * RATE) < 1.4


def test_goes_on_in_the_middle_of_a_period():
    """Bit for bit, after 18 of 40 steps, 2 of them after a synchronisation."""
    settings = ("sync=adaptive_period", "sync.period=4", "sync.sample_steps=8")
    whole = trial(4, *settings, steps=40, step_s=0.001)
    before = trial(4, *settings, steps=18, step_s=0.001)
    after = trial(
        4, *settings, steps=22, step_s=0.001, saved=[log.state for log in before if log.state], first=19
    )
    for rank in range(4):
        np.testing.assert_array_equal(after[rank].after, whole[rank].after[18:])
        assert after[rank].observed == whole[rank].observed[18:]


def test_refuses_to_sample_where_nothing_synchronises():
    ddp = ("parallel=ddp", "parallel.replicate=4", "batch.size=64", "sync=adaptive_period", "sync.period=20")
    with pytest.raises(ConfigError, match=r"sync.sample_steps=10.*Nearest sync.sample_steps: 20"):
        config(*ddp, "sync.sample_steps=10")
    config(*ddp, "sync.sample_steps=20")


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(home: Path, small_corpus: list[str]):
    settings = ("sync=adaptive_period", "sync.period=2", "sync.sample_steps=5")
    whole, cut = resumed_after_7_steps(home, *small_corpus, *settings)
    assert_same_from_step_8(whole, cut, "sync/period", "sync/variance")
