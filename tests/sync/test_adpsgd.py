"""AD-PSGD against the paper's Algorithm 1, computed again from a log of all averagings, from both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.sync import _shared
from pipeline.sync.adpsgd import Method, partners
from tests.distributed import column, gloo_ranks
from tests.sync.interrupted import whole_and_resumed
from tests.sync.trial import RATE, Delays, Log, _rank, late, trial

Events = list[tuple[str, Any]]


def logged(rank: int, *arguments: Any) -> tuple[Log, Events]:
    """A rank of the trial, with what happened to its shared weights, in order."""
    events: Events = []

    class Requests(_shared.Requests):
        def get(self, rank: int, number: int) -> str:
            word = super().get(rank, number)
            events.append(("asked", word))
            return word

    class Shared(_shared.Shared):
        def move(self, change: torch.Tensor) -> tuple[torch.Tensor, int]:
            with self._changed:
                after, answered = super().move(change)
                events.append(("moved", (change.numpy().copy(), after.numpy().copy())))
            return after, answered

        def _snapshot(self) -> torch.Tensor:
            with self._changed:
                own = super()._snapshot()
                events.append(("sent", own.numpy().copy()))
            return own

        def _settle(self, change: torch.Tensor) -> None:
            with self._changed:
                super()._settle(change)
                events.append(("averaged", change.numpy().copy()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shared, "Requests", Requests)
        patch.setattr(_shared, "Shared", Shared)
        return _rank(rank, *arguments), events


def logs_of(
    ranks: int, steps: int, delays: Delays, step_s: float = 0.005, saved: Any = None, first: int = 1
) -> list[tuple[Log, Events]]:
    arguments = (ranks, ("sync=adpsgd",), steps, delays, step_s, saved, first)
    return gloo_ranks(ranks, logged, *arguments)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def held(log: Log, index: int) -> np.ndarray:
    """The weights at which the gradient of the step of this index was computed."""
    return log.after[index - 1] if index else log.start


def verify(
    logs: Sequence[tuple[Log, Events]], begun: Sequence[np.ndarray], first: int = 1
) -> Counter[tuple[int, int]]:
    """Every averaging was one of the weights that both sides had, and nothing else changed the weights but
    every rank's own steps. `begun`: the shared weights before them. How often who asked whom."""
    ranks, steps = len(logs), len(logs[0][0].own)
    chosen = [partners(0, first + index, ranks) for index in range(steps)]
    pairs: Counter[tuple[int, int]] = Counter()
    for passive in range(1, ranks, 2):
        log, events = logs[passive]
        weights = begun[passive].astype(np.float64)
        step = asker = index = 0
        answer = np.empty(0)
        for what, value in events:
            if what == "moved":
                change, after = value
                close(change, log.own[step] - held(log, step))
                weights = weights + change
                close(after, weights)
                np.testing.assert_array_equal(after, log.after[step])
                step += 1
            elif what == "asked" and value != "end":
                asker = int(value)
                asked = [i for i in range(steps) if chosen[i][asker // 2] == passive]
                index = asked[pairs[asker, passive]]  # its step
                pairs[asker, passive] += 1
            elif what == "sent":
                answer = value
                close(answer, weights)
            elif what == "averaged":
                theirs = held(logs[asker][0], index)
                close(value, (theirs - answer) / 2)
                weights = weights + value
                active = logs[asker][0]
                close(active.after[index], active.own[index] + (answer - theirs) / 2)
        assert step == steps
        assert log.state
        close(log.state[1]["shared"].numpy(), weights)
    assert sum(pairs.values()) == steps * ((ranks + 1) // 2)  # once in every step of an active rank
    moved = sum(log.own[i].astype(np.float64) - held(log, i) for log, _ in logs for i in range(steps))
    close(shared(logs).mean(axis=0), np.mean(begun, axis=0) + moved / ranks)
    for rank, (log, _) in enumerate(logs):
        for index in range(steps):
            close(log.own[index], held(log, index) - RATE * log.gradient[index])
            assert rank % 2 or log.observed[index]["averaged"] == 1
    return pairs


def shared(logs: Sequence[tuple[Log, Events]]) -> np.ndarray:
    """What the ranks hold in the end, [ranks, n]."""
    states = [log.state for log, _ in logs if log.state]
    return np.array([own.get("shared", weights).numpy() for weights, own in states])


@pytest.mark.parametrize(("ranks", "delay_s"), [(2, 0.0), (3, 0.01), (4, 0.0), (4, 0.02), (8, 0.02)])
def test_every_averaging_is_one_of_both_sides_and_keeps_the_mean(ranks: int, delay_s: float):
    steps = 40
    logs = logs_of(ranks, steps, late(ranks, steps, delay_s) if delay_s else {})
    verify(logs, [log.start for log, _ in logs])


def test_averagings_meet_steps_under_way():
    """Without pauses, so that a rank's own update often falls between its answer and the averaging."""
    logs = logs_of(4, 200, {}, step_s=0.0)
    verify(logs, [log.start for log, _ in logs])


def test_replicas_come_together():
    """Alone each would end at a place of its own, 1 to 4. Here the mean comes to rest where the gradients,
    which are computed at copies, cancel out."""
    logs = logs_of(4, 80, {})
    assert abs(np.mean([log.gradient[40:] for log, _ in logs])) < 0.05
    apart = np.square(shared(logs) - shared(logs).mean(axis=0)).mean()
    assert apart < np.var([1, 2, 3, 4]) / 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_late_rank_delays_nobody(rank: int):
    """An active one and a passive one, whose thread answers meanwhile."""
    logs = trial(4, "sync=adpsgd", steps=30, step_s=0.02, delays={(rank, 5): 1.5})
    for other in {0, 1, 2, 3} - {rank}:
        assert max(logs[other].waited_s) < 0.3
        assert logs[other].ended_s[-1] < logs[rank].ended_s[4]
    if rank == 1:
        answered = [row["averaged"] for row in logs[1].observed]
        assert answered[4] > 10 and sum(answered) <= 60


def test_goes_on_from_where_nothing_was_on_its_way():
    before = logs_of(4, 13, late(4, 13, 0.02))
    pairs = verify(before, [log.start for log, _ in before])
    saved, begun = [log.state for log, _ in before], list(shared(before))
    after = logs_of(4, 12, late(4, 30, 0.02), saved=saved, first=14)
    for (earlier, _), (later, _) in zip(before, after, strict=True):
        np.testing.assert_array_equal(earlier.after[-1], later.start)
    pairs += verify(after, begun, first=14)
    drawn = Counter(
        (2 * i, passive) for step in range(1, 26) for i, passive in enumerate(partners(0, step, 4))
    )
    assert pairs == drawn


def test_a_settled_passive_rank_trains_on_with_all_that_it_was_asked_for():
    """A fast passive rank is asked by slow active ones after its last step."""
    delays = {(rank, step): 0.03 for rank in (0, 2) for step in range(1, 11)}
    for rank, log in enumerate(gloo_ranks(4, settling, delays)):
        if rank % 2:
            settled = log.state[1]["settled"].numpy()
            np.testing.assert_array_equal(settled, log.state[1]["shared"].numpy())
            assert not np.array_equal(settled, log.after[-1])


def settling(rank: int, delays: Delays) -> Log:
    class Settling(Method):
        def state(self) -> dict[str, torch.Tensor]:
            self.settle()
            return {**super().state(), "settled": self.replica.weights()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sync.adpsgd.Method", Settling)
        return _rank(rank, 4, ("sync=adpsgd",), 10, delays, 0.001, None, 1)


def test_partners_are_drawn_from_the_other_half():
    for ranks in (2, 3, 8, 64):
        drawn = [partners(0, step, ranks) for step in range(1, 400)]
        assert drawn == [partners(0, step, ranks) for step in range(1, 400)]
        assert {passive for step in drawn for passive in step} == set(range(1, ranks, 2))
        assert {len(step) for step in drawn} == {len(range(0, ranks, 2))}
    assert partners(0, 1, 64) != partners(1, 1, 64)


def test_a_rank_that_fails_ends_all():
    """The error that is shown is its own, not a thread's."""
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="out of order"):
        gloo_ranks(4, failing, timeout_s=60)


def failing(rank: int) -> None:
    """Rank 1 fails in its seventh step."""

    def out_of_order(method: Method, step: int, rate: float) -> None:
        if rank == 1 and step == 7:
            raise RuntimeError("out of order")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "before_step", out_of_order)
        _rank(rank, 4, ("sync=adpsgd",), 10_000, {}, 0.005, None, 1)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch, small_corpus: list[str]):
    whole, resumed = whole_and_resumed(home, monkeypatch, *small_corpus, "sync=adpsgd")
    for run in (whole, resumed):
        assert column(run, "val/loss")[-1] < column(run, "train/loss")[0] - 0.5
        assert max(column(run, "sync/consensus")) < 0.01
        # Two ranks ask once in each step; a passive one that is ahead in the end has no step to count them.
        assert 0.6 < np.mean(column(run, "sync/averaged")) <= 1
