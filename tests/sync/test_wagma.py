"""WAGMA-SGD against the paper's Algorithms 1 and 2, computed again from a log of everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.sync.wagma import grouping
from tests.support import config
from tests.sync.trial import Log, late, trial


def test_groups_are_those_of_the_papers_example():
    """Section IV-A, P = 8, S = 4."""
    assert grouping(0, 8, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert grouping(1, 8, 4) == [(0, 1, 4, 5), (2, 3, 6, 7)]


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (8, 2), (8, 4), (16, 4), (64, 8), (64, 64)])
def test_an_update_reaches_everybody_in_log_s_p_steps(ranks: int, size: int):
    """The paper's claim, from whichever step on."""
    steps = int(np.ceil(np.log(ranks) / np.log(size)))
    for first in range(8):
        reached = {0}
        for t in range(first, first + steps):
            groups = grouping(t, ranks, size)
            assert sorted(rank for group in groups for rank in group) == list(range(ranks))
            assert {len(group) for group in groups} == {size}
            reached = {rank for group in groups if reached & set(group) for rank in group}
        assert len(reached) == ranks


def replayed(logs: Sequence[Log], size: int, period: int, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What Algorithm 2 makes of the logged contributions, and the logged weights: [ranks, steps, n]."""
    ranks, steps = len(logs), len(logs[0].own)
    expected = np.zeros((ranks, steps, len(logs[0].start)))
    for index in range(steps):
        step = first + index
        together = [tuple(range(ranks))] if step % period == 0 else grouping(step - 1, ranks, size)
        for group in together:
            stale = {r: int(logs[r].observed[index]["staleness_max"]) for r in group}
            total = sum(sent(logs[r], index - stale[r]).astype(np.float64) for r in group)
            for r in group:
                fresh = not stale[r]
                expected[r, index] = (
                    total / len(group) if fresh else (total + logs[r].own[index]) / (len(group) + 1)
                )
    return expected, np.array([log.after for log in logs])


def sent(log: Log, index: int) -> np.ndarray:
    """What lay in the send buffer after the step of this index; before the first: the weights at the start."""
    return log.own[index] if index >= 0 else log.start


@pytest.mark.parametrize(
    ("ranks", "size", "period", "delay_s"),
    [(4, 2, 10, 0.0), (4, 2, 10, 0.02), (4, 4, 7, 0.02), (8, 2, 10, 0.02), (8, 4, 16, 0.02), (4, 2, 10, -1)],
)
def test_every_replica_is_what_algorithm_2_says(ranks: int, size: int, period: int, delay_s: float):
    """-1: steps of 1 ms and delays of 8 ms."""
    steps, step_s = (60, 0.005) if delay_s >= 0 else (300, 0.001)
    delays = late(ranks, steps, delay_s if delay_s >= 0 else 0.008) if delay_s else {}
    logs = trial(
        ranks,
        *("sync=wagma", f"sync.period={period}", f"sync.group_size={size}"),
        steps=steps,
        delays=delays,
        step_s=step_s,
    )
    expected, found = replayed(logs, size, period)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    staleness = np.array([[row["staleness_max"] for row in log.observed] for log in logs])
    assert staleness.max() <= period
    assert (staleness.max() > 0) or not delays  # else nothing was tested
    for step in range(period, steps + 1, period):
        at_synchronisation = found[:, step - 1]
        assert (at_synchronisation == at_synchronisation[0]).all()  # to the bit
        assert (staleness[:, step - 1] == 0).all()


def test_with_one_group_and_a_period_of_one_models_are_averaged_in_every_step():
    logs = trial(4, "sync=wagma", "sync.period=1", "sync.group_size=4", steps=10)
    for index in range(10):
        mean = np.mean([log.own[index].astype(np.float64) for log in logs], axis=0)
        for log in logs:
            np.testing.assert_allclose(log.after[index], mean, rtol=1e-6, atol=1e-7)


def test_a_late_rank_delays_nobody_before_the_synchronisation():
    """Rank 1 comes 0.5 s (ten steps' time) late to step 12; the others meet it in step 20 only."""
    logs = trial(
        4, "sync=wagma", "sync.period=20", "sync.group_size=2", steps=40, step_s=0.05, delays={(1, 12): 0.5}
    )
    for rank in (0, 2, 3):
        waits = logs[rank].waited_s
        assert max(waits[11:19]) < 0.25 <= waits[19]
        assert logs[rank].ended_s[18] < logs[1].ended_s[11]  # seven steps ahead of it
    staleness = [int(row["staleness_max"]) for row in logs[1].observed]
    assert max(staleness) == staleness[18] >= 1 and staleness[19] == 0  # it caught up by the synchronisation


def test_goes_on_in_the_middle_of_a_period():
    """With the models and buffers of step 13 of a period of 10, no rank's last contribution is lost."""
    settings = ("sync=wagma", "sync.period=10", "sync.group_size=2")
    before = trial(4, *settings, steps=13, delays=late(4, 13, 0.01))
    saved = [log.state for log in before]
    assert all(saved)
    after = trial(4, *settings, steps=12, delays=late(4, 30, 0.01), saved=saved, first=14)
    for earlier, later in zip(before, after, strict=True):
        assert (earlier.after[-1] == later.start).all()
        later.start = earlier.own[-1]  # what its buffer holds
    expected, found = replayed(after, 2, 10, first=14)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "size", "near"),
    [
        (6, 2, "group_size=2 parallel.replicate=4"),
        (4, 3, "group_size=2 parallel.replicate=4"),
        (4, 8, "group_size=4"),
    ],
)
def test_refuses_what_is_no_power_of_two(ranks: int, size: int, near: str):
    with pytest.raises(ConfigError, match=near):
        config(
            *("parallel=ddp", f"parallel.replicate={ranks}", "batch.size=96", "sync=wagma"),
            f"sync.group_size={size}",
        )
