"""DaSGD, its models computed again from a log of everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from tests.support import config
from tests.sync.resume import assert_same_from_step_8, resumed_after_7_steps
from tests.sync.trial import trial


@pytest.mark.parametrize(("ranks", "period", "delay_steps"), [(4, 5, 0), (4, 5, 2), (8, 6, 5), (4, 1, 0)])
def test_every_replica_takes_the_mean_for_its_own_and_keeps_its_steps(
    ranks: int, period: int, delay_steps: int
):
    settings = (f"sync.period={period}", f"sync.delay_steps={delay_steps}")
    logs = trial(ranks, "sync=delayed_averaging", *settings, steps=20, step_s=0.001)
    own = np.array([log.own for log in logs], dtype=np.float64)  # [ranks, steps, n]
    expected = own.copy()
    for sent in range(period, 21 - delay_steps, period):
        before, arrived = sent - 1, sent - 1 + delay_steps
        # Steps' effects add up: what arrives is the correction of d steps ago.
        expected[:, arrived] += own[:, before].mean(axis=0) - own[:, before]
    found = np.array([log.after for log in logs])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean(axis=0), own.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert not np.allclose(own, expected)


def test_without_delay_it_is_local_sgd():
    """To the bit."""
    delayed = trial(
        4, "sync=delayed_averaging", "sync.period=4", "sync.delay_steps=0", steps=18, step_s=0.001
    )
    local = trial(4, "sync=local_sgd", "sync.period=4", steps=18, step_s=0.001)
    for here, there in zip(delayed, local, strict=True):
        np.testing.assert_array_equal(here.after, there.after)


def test_a_late_rank_delays_the_others_only_where_the_average_is_needed():
    """Rank 1 comes 0.5 s late to step 9; its average of step 10 is needed after step 16."""
    settings = ("sync.period=10", "sync.delay_steps=6")
    logs = trial(4, "sync=delayed_averaging", *settings, steps=20, step_s=0.02, delays={(1, 9): 0.5})
    for rank in (0, 2, 3):
        waits = logs[rank].waited_s
        assert max(waits[:15]) < 0.2 < waits[15]


@pytest.mark.parametrize("stop", [11, 13, 14])
def test_goes_on_with_an_average_on_its_way(stop: int):
    """Bit for bit: after 11 of 24 steps one of step 10 is on its way, after 13 it has just been used."""
    settings = ("sync=delayed_averaging", "sync.period=5", "sync.delay_steps=3")
    whole = trial(4, *settings, steps=24, step_s=0.001)
    before = trial(4, *settings, steps=stop, step_s=0.001)
    saved = [log.state for log in before if log.state]
    after = trial(4, *settings, steps=24 - stop, step_s=0.001, saved=saved, first=stop + 1)
    for rank in range(4):
        np.testing.assert_array_equal(after[rank].after, whole[rank].after[stop:])


@pytest.mark.parametrize(("delay_steps", "near"), [(5, 4), (9, 4), (-1, 0)])
def test_refuses_an_average_that_the_next_one_would_overtake(delay_steps: int, near: int):
    ddp = ("parallel=ddp", "parallel.replicate=4", "batch.size=64", "sync=delayed_averaging", "sync.period=5")
    with pytest.raises(
        ConfigError, match=f"sync.delay_steps={delay_steps}.*Nearest sync.delay_steps: {near}"
    ):
        config(*ddp, f"sync.delay_steps={delay_steps}")


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(home: Path, small_corpus: list[str]):
    """The average of step 5 is on its way when step 7 is saved, that of step 20 when the run ends."""
    settings = ("sync=delayed_averaging", "sync.period=5", "sync.delay_steps=3")
    assert_same_from_step_8(*resumed_after_7_steps(home, *small_corpus, *settings))
