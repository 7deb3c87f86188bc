"""D-PSGD against the paper's Algorithm 1, computed again from a log of everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.sync.dpsgd import neighbours
from tests.distributed import column
from tests.sync.interrupted import whole_and_resumed
from tests.sync.trial import RATE, Delays, Log, gradient_at, trial

LATE: Delays = {(0, 3): 0.03, (2, 7): 0.05, (1, 8): 0.02}


def held(logs: Sequence[Log], index: int) -> np.ndarray:
    """x_k of all ranks [ranks, n], k the step of this index."""
    return np.array([log.after[index - 1] if index else log.start for log in logs]).astype(np.float64)


def ring(ranks: int) -> np.ndarray:
    """W, as the paper has it; for two ranks the only one that is symmetric and of equal parts."""
    if ranks == 2:
        return np.full((2, 2), 1 / 2)
    near = np.eye(ranks)
    return (near + np.roll(near, 1, axis=0) + np.roll(near, -1, axis=0)) / 3


@pytest.mark.parametrize(("ranks", "delays"), [(2, {}), (3, LATE), (4, LATE), (8, LATE)])
def test_every_replica_is_what_algorithm_1_says(ranks: int, delays: Delays):
    logs = trial(ranks, "sync=dpsgd", steps=15, delays={} if ranks == 2 else delays)
    mixing = ring(ranks)
    assert (mixing == mixing.T).all() and np.allclose(mixing.sum(axis=0), 1)
    for index in range(15):
        before = held(logs, index)
        for rank, log in enumerate(logs):  # at the weights before they were mixed
            expected = gradient_at(torch.from_numpy(before[rank]).float(), rank, index + 1)
            np.testing.assert_array_equal(log.gradient[index], expected.numpy())
        gradients = np.array([log.gradient[index] for log in logs])
        np.testing.assert_allclose(
            [log.after[index] for log in logs], mixing @ before - RATE * gradients, rtol=1e-5, atol=1e-6
        )
        # The mean model does what SGD with the mean gradient would do.
        np.testing.assert_allclose(
            held(logs, index + 1).mean(axis=0), (before - RATE * gradients).mean(axis=0), rtol=1e-5, atol=1e-6
        )


def test_a_late_rank_holds_up_one_more_neighbour_in_every_step():
    """Rank 0 sends its weights of step 5, then computes for long; at distance d step 5 + d needs it."""
    logs = trial(8, "sync=dpsgd", steps=12, delays={(0, 5): 1.0})
    back = logs[0].ended_s[4]
    for rank, distance in ((1, 1), (7, 1), (2, 2), (6, 2), (3, 3), (5, 3), (4, 4)):
        assert logs[rank].ended_s[5 + distance - 2] < back - 0.3
        assert logs[rank].ended_s[5 + distance - 1] > back - 0.3
        assert logs[rank].waited_s[5 + distance - 1] > 0.3


def test_goes_on_bit_for_bit():
    whole = trial(4, "sync=dpsgd", steps=12)
    before = trial(4, "sync=dpsgd", steps=5)
    saved = [log.state for log in before if log.state]
    after = trial(4, "sync=dpsgd", steps=7, saved=saved, first=6)
    for one, later in zip(whole, after, strict=True):
        np.testing.assert_array_equal(one.after[5:], later.after)


def test_neighbours_on_a_ring():
    assert [neighbours(rank, 4) for rank in range(4)] == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert [neighbours(rank, 2) for rank in range(2)] == [[1], [0]]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not(
    home: Path, monkeypatch: pytest.MonkeyPatch, small_corpus: list[str]
):
    whole, resumed = whole_and_resumed(home, monkeypatch, *small_corpus, "sync=dpsgd")
    for name in ("train/loss", "grad/norm", "sync/consensus", "val/loss"):
        assert column(resumed, name) == column(whole, name), name
    assert column(whole, "val/loss")[-1] < column(whole, "train/loss")[0] - 0.5
