"""Gradient coding: the exact gradient in every step, whoever is late."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.sync import method_class
from pipeline.sync._replica import Replica
from tests.distributed import column, gloo_ranks, ranks_of, train_here
from tests.support import config
from tests.sync.trial import Log, gradient_at, late, stopped_once, trial


def assert_exact(logs: Sequence[Log], first: int = 1) -> None:
    """All models are one, to the bit, and step by the mean gradient of all shares at its weights."""
    for log in logs:
        assert (np.array(log.after) == logs[0].after).all()
    weights = [logs[0].start, *logs[0].after]
    for index, applied in enumerate(logs[0].applied):
        at = torch.from_numpy(weights[index])
        gradients = [gradient_at(at, share, first + index).numpy() for share in range(len(logs))]
        np.testing.assert_allclose(applied, np.mean(gradients, axis=0), rtol=1e-5, atol=1e-5)


def skipped(logs: Sequence[Log]) -> np.ndarray:
    """[ranks, steps]"""
    return np.array([[bool(row["skipped"]) for row in log.observed] for log in logs])


@pytest.mark.parametrize(
    ("ranks", "redundancy", "delay_s"), [(4, 1, 0.02), (4, 2, 0.05), (4, 2, -1), (4, 4, 0.05), (8, 2, 0.1)]
)
def test_every_step_applies_the_exact_gradient(ranks: int, redundancy: int, delay_s: float):
    """-1: steps of 1 ms and delays of 8 ms."""
    steps, step_s = (25, 0.005) if delay_s >= 0 else (150, 0.001)
    logs = trial(
        ranks,
        *("sync=gradient_coding", "sync.period=10", f"sync.redundancy={redundancy}"),
        steps=steps,
        delays=late(ranks, steps, delay_s if delay_s >= 0 else 0.008),
        step_s=step_s,
    )
    assert_exact(logs)
    without = skipped(logs)
    assert without.any() == (redundancy > 1)
    assert not without[:, 9::10].any()
    clusters = without.reshape(ranks // redundancy, redundancy, steps)
    assert not clusters.all(axis=1).any()  # somebody of each computes


def test_one_late_rank_of_each_cluster_delays_nobody():
    """Ranks 1 and 2 of the clusters {0, 1} and {2, 3} come 0.5 s late to step 12 and apply the next at once;
    the others meet them in step 20 only."""
    logs = trial(
        4,
        *("sync=gradient_coding", "sync.period=20", "sync.redundancy=2"),
        steps=40,
        step_s=0.05,
        delays={(1, 12): 0.5, (2, 12): 0.5},
    )
    assert_exact(logs)
    for on_time in (0, 3):
        assert max(logs[on_time].waited_s[:19]) < 0.25
        assert logs[on_time].ended_s[15] < logs[1].ended_s[11]  # four steps ahead of it
    assert skipped(logs)[1:3, 12:16].all()


def test_a_cluster_that_is_late_as_a_whole_is_waited_for():
    delays = {(0, 5): 0.4, (1, 5): 0.4}
    logs = trial(4, "sync=gradient_coding", "sync.period=10", "sync.redundancy=2", steps=8, delays=delays)
    assert_exact(logs)
    assert min(logs[2].waited_s[4], logs[3].waited_s[4]) > 0.2


def test_goes_on_in_the_middle_of_a_period():
    settings = ("sync=gradient_coding", "sync.period=10", "sync.redundancy=2")
    before = trial(4, *settings, steps=13, delays=late(4, 13, 0.01))
    saved = [log.state for log in before]
    assert all(saved)
    after = trial(4, *settings, steps=12, delays=late(4, 30, 0.01), saved=saved, first=14)
    assert_exact(after, first=14)
    unbroken = trial(4, *settings, steps=25)
    assert (unbroken[0].after[-1] == after[0].after[-1]).all()  # to the bit


def test_a_rank_that_gives_up_ends_the_others():
    ended = gloo_ranks(4, _giving_up, 3)
    assert ended[3] == "left" and "went on" not in ended


def _giving_up(rank: int, who: int) -> str:
    """What a step raises here, after rank `who` has left in step 5."""
    composed = config("parallel=ddp", "parallel.replicate=4", "batch.size=96", "sync=gradient_coding")
    replica = Replica(torch.nn.Linear(10, 1), ranks_of(composed, rank))
    method = method_class("gradient_coding")(composed, ranks_of(composed, rank), replica)
    method.start(0)
    try:
        for step in range(1, 10):
            if rank == who and step == 5:
                return "left"
            method.decided(step)
            time.sleep(0.1)  # else the others have done all steps before it has gone
            method.before_step(step, 0.1)
    except RuntimeError as error:
        return str(error)
    finally:
        method.abort()
    return "went on"


@pytest.mark.parametrize(("ranks", "redundancy", "near"), [(4, 3, 2), (8, 16, 8), (6, 5, 6)])
def test_refuses_clusters_of_unequal_size(ranks: int, redundancy: int, near: int):
    with pytest.raises(ConfigError, match=rf"Nearest sync\.redundancy: {near}$"):
        config(
            *("parallel=ddp", f"parallel.replicate={ranks}", "batch.size=96", "sync=gradient_coding"),
            f"sync.redundancy={redundancy}",
        )


@pytest.mark.slow
def test_trains_as_allreduce_does(home: Path, small_corpus: list[str]):
    """20 steps, stopped and resumed after the 10th, the last of 5 sequences, of which some shares have none."""
    common = (
        *("model.width=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64", *small_corpus),
        *("data.sequence_length=32", "data.micro_batch=2", "batch.size=16", "budget.tokens=9888"),
        *("lr.warmup_tokens=1k", "eval.sequences=8", "checkpoint.interval_tokens=5120"),
        *("parallel=ddp", "parallel.replicate=4"),
    )
    imbalance = ("imbalance=delay", "imbalance.ranks=1", "imbalance.delay_ms=100")
    coded = ("sync=gradient_coding", "sync.redundancy=2", "sync.period=8", "sync.consensus=true")
    exact, run = train_here(config(*common)), stopped_once(config(*common, *imbalance, *coded))
    assert column(run, "attempt") == [1] * 10 + [2] * 11  # with the row of the evaluation
    for name in ("train/loss", "grad/norm", "val/loss"):
        np.testing.assert_allclose(column(run, name), column(exact, name), rtol=1e-5)
    assert len(column(run, "train/loss")) == 20 and column(run, "batch/size")[-1] == 5
    assert column(run, "sync/consensus") == [0.0] * 20
    assert 0 < np.mean(column(run, "sync/skipped")) < 0.5
