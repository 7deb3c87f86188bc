"""Eager-SGD computed again from a log of everything: which gradients are in which sum, each in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from tests.distributed import column
from tests.support import config
from tests.sync.trial import Log, late, stopped_once, trial


def replayed(logs: Sequence[Log]) -> np.ndarray:
    """The average that every step should have applied, [steps, n]: of each rank all that it computed since it
    last was in a sum, up to the step that it says it had reached."""
    steps = len(logs[0].gradient)
    expected = np.zeros((steps, len(logs[0].start)))
    for log in logs:
        before = 0
        for index in range(steps):
            reached = index + 1 - int(log.observed[index]["staleness_max"])
            expected[index] += np.sum(log.gradient[before:reached], axis=0, dtype=np.float64)
            before = reached
    return expected / len(logs)


def assert_applied_once(logs: Sequence[Log], period: int) -> None:
    """Steps do what the log says, models are one, and over a period all that was computed is applied."""
    for log in logs:
        assert (np.array(log.applied) == logs[0].applied).all()  # to the bit
        assert (np.array(log.after) == logs[0].after).all()
    applied = np.array(logs[0].applied, dtype=np.float64)
    np.testing.assert_allclose(applied, replayed(logs), rtol=1e-5, atol=1e-5)
    computed = np.mean([log.gradient for log in logs], axis=0, dtype=np.float64)
    for end in range(period, len(applied) + 1, period):
        whole = slice(end - period, end)
        np.testing.assert_allclose(applied[whole].sum(0), computed[whole].sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "quorum", "period", "delay_s"),
    [(4, "solo", 10, 0.02), (4, "majority", 10, 0.02), (8, "majority", 12, 0.02), (4, "solo", 10, -1)],
)
def test_every_gradient_is_applied_once_by_all(ranks: int, quorum: str, period: int, delay_s: float):
    """-1: steps of 1 ms and delays of 8 ms."""
    steps, step_s = (2 * period + 5, 0.005) if delay_s >= 0 else (150, 0.001)
    logs = trial(
        ranks,
        *("sync=eager_sgd", f"sync.period={period}", f"sync.quorum={quorum}"),
        steps=steps,
        delays=late(ranks, steps, delay_s if delay_s >= 0 else 0.008),
        step_s=step_s,
    )
    assert_applied_once(logs, period)
    staleness = np.array([[row["staleness_max"] for row in log.observed] for log in logs])
    assert 0 < staleness.max() < period
    assert (staleness[:, period - 1 :: period] == 0).all()
    fresh = (staleness == 0).sum(axis=0)
    assert fresh.min() >= (1 if quorum == "solo" else ranks / 2)


def test_with_a_period_of_one_it_is_allreduce():
    logs = trial(4, "sync=eager_sgd", "sync.period=1", steps=10)
    mean = np.mean([log.gradient for log in logs], axis=0, dtype=np.float64)
    for log in logs:
        np.testing.assert_allclose(log.applied, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("quorum", "waits"), [("solo", False), ("majority", True)])
def test_who_waits_for_whom(quorum: str, waits: bool):
    """All but rank 0 come 0.6 s late to step 5."""
    delays = {(rank, 5): 0.6 for rank in (1, 2, 3)}
    settings = ("sync=eager_sgd", "sync.period=10", f"sync.quorum={quorum}")
    logs = trial(4, *settings, steps=12, delays=delays)
    waited = np.array(logs[0].waited_s)
    assert max(waited[:4]) < 0.3
    assert (waited[4] > 0.3) == waits
    assert (waited[9] > 0.3) == (not waits)  # the end of the period


@pytest.mark.parametrize("quorum", ["solo", "majority"])
def test_goes_on_with_what_was_left_over(quorum: str):
    """Rank 1 is late in steps 12 and 13, after which the run is cut; the period ends with step 20."""
    settings = ("sync=eager_sgd", "sync.period=10", f"sync.quorum={quorum}")
    before = trial(4, *settings, steps=13, delays={(1, 12): 0.1, (1, 13): 0.1})
    saved = [log.state for log in before]
    assert all(saved)
    assert before[1].state and before[1].state[1]["left_over"].abs().max() > 0
    after = trial(4, *settings, steps=12, delays=late(4, 30, 0.01), saved=saved, first=14)
    for earlier, later in zip(before, after, strict=True):
        assert (earlier.after[-1] == later.start).all()
        for name in ("gradient", "applied", "after", "observed"):
            getattr(earlier, name).extend(getattr(later, name))
    assert_applied_once(before, 10)


def test_refuses_a_batch_test_where_nobody_waits():
    with pytest.raises(ConfigError, match=r"Nearest batch\.interval: 10"):
        config(
            *("parallel=ddp", "parallel.replicate=4", "sync=eager_sgd", "sync.period=10"),
            *("batch=norm_test", "batch.max_size=64", "batch.estimator=worker", "batch.interval=7"),
            "batch.size=16",
        )


@pytest.mark.slow
def test_trains_as_one_model_also_when_interrupted(home: Path, small_corpus: list[str]):
    composed = config(
        *("model.width=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64", *small_corpus),
        *("data.sequence_length=32", "data.micro_batch=2", "batch.size=8", "budget.tokens=7680"),  # 30 steps
        *("lr.warmup_tokens=500", "eval.sequences=8", "checkpoint.interval_tokens=3072"),
        *("parallel=ddp", "parallel.replicate=4", "sync=eager_sgd", "sync.period=8", "sync.consensus=true"),
        *("imbalance=delay", "imbalance.ranks=1", "imbalance.delay_ms=30"),
    )
    run = stopped_once(composed)
    assert column(run, "attempt") == [1] * 12 + [2] * 19  # with the row of the evaluation
    assert column(run, "sync/consensus") == [0.0] * 30
    assert np.mean(column(run, "sync/fresh")) < 1
    losses = column(run, "train/loss")
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
