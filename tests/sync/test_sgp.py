"""Stochastic gradient push against the paper's Algorithm 1, computed again from a log of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.sync.sgp import distances, powers
from tests.distributed import column
from tests.support import config
from tests.sync.interrupted import whole_and_resumed
from tests.sync.trial import RATE, WEIGHTS, Delays, trial

Saved = Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
LATE: Delays = {(0, 3): 0.03, (2, 7): 0.05, (1, 8): 0.02}


def mixing(step: int, ranks: int, neighbours: int) -> np.ndarray:
    """p [to, from] of this step, counted from 1. The powers are those of the paper's appendix A.1."""
    exponents = int(np.floor(np.log2(ranks - 1))) + 1
    shares = np.eye(ranks)
    for index in range(neighbours):
        distance = 2 ** ((step - 1 + index) % exponents)
        shares += np.roll(np.eye(ranks), distance, axis=0)  # a rank's share goes so many ranks on
    return shares / (neighbours + 1)


def uneven(ranks: int) -> Saved:
    """A start as push-sum allows it: with weights of which only the sum is P."""
    random = np.random.default_rng(3)
    numerators = torch.from_numpy(random.normal(size=(ranks, WEIGHTS))).float()
    weights = torch.from_numpy(random.uniform(0.5, 1.5, size=ranks)).float()
    weights *= ranks / weights.sum()
    return [
        (numerator / weight, {"numerator": numerator, "weight": weight.view(1)})
        for numerator, weight in zip(numerators, weights, strict=True)
    ]


@pytest.mark.parametrize(
    ("ranks", "neighbours", "even"),
    [(2, 1, True), (4, 1, True), (4, 2, False), (6, 2, True), (8, 1, False), (8, 3, True)],
)
def test_every_replica_is_what_algorithm_1_says(ranks: int, neighbours: int, even: bool):
    saved, steps = None if even else uneven(ranks), 15
    logs = trial(
        ranks,
        *("sync=sgp", f"sync.neighbours={neighbours}"),
        steps=steps,
        delays=LATE if ranks > 2 else {},
        saved=saved,
    )
    numerator = np.array([s[1]["numerator"].numpy() for s in saved] if saved else [g.start for g in logs])
    weight = np.array([s[1]["weight"].item() for s in saved] if saved else [1.0] * ranks)
    for index in range(steps):
        gradients = np.array([log.gradient[index] for log in logs])
        stepped = numerator.astype(np.float64) - RATE * gradients
        shares = mixing(index + 1, ranks, neighbours)
        numerator, weight = shares @ stepped, shares @ weight
        np.testing.assert_allclose(
            [log.after[index] for log in logs], numerator / weight[:, None], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(numerator.mean(axis=0), stepped.mean(axis=0), rtol=1e-5, atol=1e-6)
    states = [log.state[1] for log in logs if log.state]
    found = np.array([state["weight"].item() for state in states])
    np.testing.assert_allclose(found, weight, rtol=1e-5)
    np.testing.assert_allclose(found.sum(), ranks, rtol=1e-6)
    # What the ranks hold in the end is the start and all gradients, nothing lost or doubled.
    total = np.sum([state["numerator"].numpy().astype(np.float64) for state in states], axis=0)
    begun = np.sum([s[1]["numerator"].numpy() for s in saved] if saved else [g.start for g in logs], axis=0)
    moved = RATE * np.sum([log.gradient for log in logs], axis=(0, 1))
    np.testing.assert_allclose(total, begun - moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_as_many_steps_as_powers_average_exactly(ranks: int):
    for first in range(1, 4):
        product = np.eye(ranks)
        for step in range(first, first + powers(ranks)):
            shares = np.eye(ranks)
            for distance in distances(step, ranks, 1):
                shares += np.roll(np.eye(ranks), distance, axis=0)
            product = shares / 2 @ product
        np.testing.assert_array_equal(product, np.full((ranks, ranks), 1 / ranks))


def test_a_rank_waits_for_its_in_neighbours_only():
    """Rank 0 is late to step 4; who waits is whom its weights of step 4 would have reached."""
    steps = 8
    logs = trial(8, "sync=sgp", steps=steps, delays={(0, 4): 1.0})
    back, reached = logs[0].ended_s[3], {0}
    for step in range(4, steps + 1):
        reached |= {(rank + distance) % 8 for rank in reached for distance in distances(step, 8, 1)}
        for rank in range(1, 8):
            assert (logs[rank].ended_s[step - 1] > back - 0.3) == (rank in reached)


def test_goes_on_bit_for_bit():
    settings = ("sync=sgp", "sync.neighbours=2")
    whole = trial(4, *settings, steps=12, saved=uneven(4))
    before = trial(4, *settings, steps=5, saved=uneven(4))
    saved = [log.state for log in before if log.state]
    after = trial(4, *settings, steps=7, saved=saved, first=6)
    for one, later in zip(whole, after, strict=True):
        np.testing.assert_array_equal(one.after[5:], later.after)


@pytest.mark.parametrize(("ranks", "neighbours", "near"), [(2, 2, 1), (4, 3, 2), (6, 4, 3), (8, 8, 3)])
def test_refuses_more_neighbours_than_there_are(ranks: int, neighbours: int, near: int):
    options = ("parallel=ddp", f"parallel.replicate={ranks}", "batch.size=96", "sync=sgp")
    with pytest.raises(ConfigError, match=f"Nearest sync.neighbours: {near}$"):
        config(*options, f"sync.neighbours={neighbours}")
    config(*options, f"sync.neighbours={near}")


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not(
    home: Path, monkeypatch: pytest.MonkeyPatch, small_corpus: list[str]
):
    whole, resumed = whole_and_resumed(home, monkeypatch, *small_corpus, "sync=sgp", "sync.neighbours=2")
    for name in ("train/loss", "grad/norm", "sync/consensus", "val/loss"):
        assert column(resumed, name) == column(whole, name), name
    assert column(whole, "val/loss")[-1] < column(whole, "train/loss")[0] - 0.5
