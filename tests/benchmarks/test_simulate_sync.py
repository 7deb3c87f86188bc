"""The recurrences against a simulation event by event, closed forms and bounds."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np
import pytest

from analysis.synchronisation import Network
from benchmarks import simulate_sync
from benchmarks.simulate_sync import SETTINGS, Measured, Times, heavy_tailed, lognormal, measured, spread
from benchmarks.sync_model import (
    Costs,
    Options,
    Seconds,
    Work,
    alone,
    averaging,
    background,
    butterfly,
    delayed_averaging,
    exponential,
    gradient_coding,
    methods,
    ring,
    sent_before,
    with_neighbours,
    world,
)
from pipeline.config import ConfigError
from pipeline.imbalance import Imbalance
from pipeline.sync.wagma import grouping

# --- events: actors that sleep, and wait for things that happen


class Happening:
    """Something that happens once."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.waiting: list[Actor] = []


Actor = Generator[float | Happening, None, None]


class Timeline:
    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), what))

    def happens(self, happening: Happening) -> None:
        if happening.at is None:
            happening.at = self.now
            for actor in happening.waiting:
                self.later(0.0, lambda actor=actor: self.go_on(actor))

    def go_on(self, actor: Actor) -> None:
        for wanted in actor:
            if isinstance(wanted, float):
                self.later(wanted, lambda: self.go_on(actor))
                return
            if wanted.at is None:
                wanted.waiting.append(actor)
                return

    def run(self, actors: list[Actor]) -> None:
        for actor in actors:
            self.later(0.0, lambda actor=actor: self.go_on(actor))
        while self._queue:
            self.now, _, what = heapq.heappop(self._queue)
            what()


class Meeting:
    """Is over `cost_s` after the last of so many has come."""

    def __init__(self, timeline: Timeline, size: int, cost_s: float) -> None:
        self._timeline, self._missing, self._cost_s = timeline, size, cost_s
        self.over = Happening()

    def come(self) -> Happening:
        self._missing -= 1
        if self._missing == 0:
            self._timeline.later(self._cost_s, lambda: self._timeline.happens(self.over))
        return self.over


def by_events(own_s: Seconds, actors: Callable[[Timeline, Seconds], list[Actor]]) -> Seconds:
    timeline, ended = Timeline(), np.full(own_s.shape, np.nan)
    timeline.run(actors(timeline, ended))
    assert not np.isnan(ended).any()
    return ended


def meetings_of(
    timeline: Timeline,
    together: Callable[[int], list[tuple[int, ...]]],
    steps: int,
    cost_s: Callable[[int], float],
) -> dict[tuple[int, int], Meeting]:
    """By step and rank."""
    found = {}
    for step in range(1, steps + 1):
        for members in together(step):
            meeting = Meeting(timeline, len(members), cost_s(step))
            found.update({(step, rank): meeting for rank in members})
    return found


def averaging_by_events(own_s: Seconds, period: int, delay_steps: int, exchange_s: float) -> Seconds:
    """`delay_steps` 0: the ranks wait at once."""
    steps, ranks = own_s.shape

    def actors(timeline: Timeline, ended: Seconds) -> list[Actor]:
        meetings = {step: Meeting(timeline, ranks, exchange_s) for step in range(period, steps + 1, period)}

        def main(rank: int) -> Actor:
            under_way: dict[int, Happening] = {}
            for step in range(1, steps + 1):
                yield float(own_s[step - 1, rank])
                for due in (due for due in sorted(under_way) if due == step):
                    yield under_way.pop(due)
                if step in meetings:
                    over = meetings[step].come()
                    if delay_steps:
                        under_way[step + delay_steps] = over
                    else:
                        yield over
                ended[step - 1, rank] = timeline.now

        return [main(rank) for rank in range(ranks)]

    return by_events(own_s, actors)


def neighbours_by_events(
    own_s: Seconds,
    sources: Callable[[int, int], set[int]],
    cost_s: float,
    before: bool = False,
    drift_steps: int | None = None,
) -> Seconds:
    """`before`: messages leave before the rank's own work, not after it."""
    steps, ranks = own_s.shape

    def actors(timeline: Timeline, ended: Seconds) -> list[Actor]:
        everything = [(step, rank) for step in range(1, steps + 1) for rank in range(ranks)]
        sent = {each: Happening() for each in everything}
        received = {each: Happening() for each in everything}
        interval = drift_steps or steps + 1
        reports = {step: Meeting(timeline, ranks, 0.0) for step in range(interval, steps + 1, interval)}

        def main(rank: int) -> Actor:
            for step in range(1, steps + 1):
                if not before:
                    yield float(own_s[step - 1, rank])
                timeline.happens(sent[step, rank])
                if before:
                    yield float(own_s[step - 1, rank])
                yield received[step, rank]
                if step in reports:
                    if step - interval in reports:
                        yield reports[step - interval].over
                    reports[step].come()
                ended[step - 1, rank] = timeline.now

        def mail(step: int, rank: int) -> Actor:
            for source in {rank, *sources(step, rank)}:
                yield sent[step, source]
            yield cost_s
            timeline.happens(received[step, rank])

        return [*(main(rank) for rank in range(ranks)), *(mail(*each) for each in everything)]

    return by_events(own_s, actors)


def background_by_events(
    own_s: Seconds,
    together: Callable[[int], list[tuple[int, ...]]],
    period: int,
    costs: Costs,
    quorum: int,
    grace_s: float,
) -> tuple[Seconds, float]:
    """A main and a communication thread for each rank, as in pipeline.sync._background; and the share that was
    fresh."""
    steps, ranks = own_s.shape
    fresh: list[bool] = []

    def waits(step: int) -> bool:
        return step % period == 0

    def actors(timeline: Timeline, ended: Seconds) -> list[Actor]:
        keys = {step: Happening() for step in range(1, steps + 1)}
        arrivals = dict.fromkeys(range(1, steps + 1), 0)
        arrived = {(step, rank): Happening() for step in range(1, steps + 1) for rank in range(ranks)}
        done = {(step, rank): Happening() for step in range(1, steps + 1) for rank in range(ranks)}
        everyone = [tuple(range(ranks))]

        def groups(step: int) -> list[tuple[int, ...]]:
            return everyone if waits(step) else together(step)

        def cost_s(step: int) -> float:
            return costs.everyone_s if len(groups(step)) == 1 else costs.group_s

        meetings = meetings_of(timeline, groups, steps, cost_s)

        def main(rank: int) -> Actor:
            for step in range(1, steps + 1):
                yield float(own_s[step - 1, rank])
                timeline.happens(arrived[step, rank])
                arrivals[step] += 1
                if arrivals[step] == quorum and not waits(step):
                    timeline.later(costs.activation_s, lambda key=keys[step]: timeline.happens(key))
                yield done[step, rank]
                ended[step - 1, rank] = timeline.now

        def communication(rank: int) -> Actor:
            for step in range(1, steps + 1):
                if waits(step):
                    yield arrived[step, rank]
                else:
                    yield keys[step]
                    is_close = step == 1 or arrived[step - 1, rank].at is not None
                    if grace_s and is_close and arrived[step, rank].at is None:
                        first = Happening()  # of the arrival and the end of the grace
                        timeline.later(grace_s, lambda first=first: timeline.happens(first))
                        timeline.go_on(passed_on(arrived[step, rank], first))
                        yield first
                    fresh.append(arrived[step, rank].at is not None)
                yield meetings[step, rank].come()
                timeline.happens(done[step, rank])

        def passed_on(one: Happening, other: Happening) -> Actor:
            yield one
            timeline.happens(other)

        return [actor(rank) for rank in range(ranks) for actor in (main, communication)]

    return by_events(own_s, actors), float(np.mean(fresh))


def coding_by_events(own_s: Seconds, copies: int, period: int, exchange_s: float) -> Seconds:
    steps, ranks = own_s.shape

    def actors(timeline: Timeline, ended: Seconds) -> list[Actor]:
        begun = {step: Happening() for step in range(1, steps + 1)}
        done = {step: Happening() for step in begun}
        come: dict[int, set[int]] = {step: set() for step in done}  # ranks, or clusters of them

        def end(step: int) -> None:
            ended[step - 1] = timeline.now
            timeline.happens(done[step])

        def main(rank: int) -> Actor:
            for step in range(1, steps + 1):
                all_wait = step % period == 0
                if begun[step].at is None:
                    yield float(own_s[step - 1, rank])
                    come[step].add(rank if all_wait else rank // copies)
                    wanted = ranks if all_wait else ranks // copies
                    if len(come[step]) == wanted and begun[step].at is None:
                        timeline.happens(begun[step])
                        timeline.later(exchange_s, lambda step=step: end(step))
                yield done[step]

        return [main(rank) for rank in range(ranks)]

    return by_events(own_s, actors)


# --- against events


def uneven(ranks: int, steps: int = 60, seed: int = 0) -> Seconds:
    """Steps of 1 s, with a heavy tail."""
    random = np.random.default_rng(seed)
    return 1 + 0.05 * random.random((steps, ranks)) + random.lognormal(-2, 1.5, (steps, ranks))


@pytest.mark.parametrize(("period", "delay_steps"), [(1, 0), (4, 0), (1, 1), (4, 1), (4, 3), (4, 4)])
def test_averages_are_those_of_events(period: int, delay_steps: int):
    own_s = uneven(6)
    expected = averaging_by_events(own_s, period, delay_steps, 0.7)
    if delay_steps:
        found = delayed_averaging(own_s, period, delay_steps, 0.7)
    else:
        found = averaging(own_s, period, 0.7)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)


def beside(step: int, rank: int) -> set[int]:
    return {(rank - 1) % 6, (rank + 1) % 6}


DRIFTS = [None, 1, 3]


@pytest.mark.parametrize("drift_steps", DRIFTS)
@pytest.mark.parametrize("message_s", [0.01, 0.7])  # two of them are less and more than most steps
def test_a_ring_is_that_of_events(message_s: float, drift_steps: int | None):
    own_s = uneven(6)
    expected = neighbours_by_events(own_s, beside, 2 * message_s, before=True, drift_steps=drift_steps)
    found = sent_before(own_s, ring(6), message_s, drift_steps=drift_steps)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)


def test_a_ring_after_the_gradient_is_that_of_events():
    own_s = uneven(6)
    expected = neighbours_by_events(own_s, beside, 0.2)
    np.testing.assert_allclose(with_neighbours(own_s, ring(6), 0.1).ended_s, expected, rtol=1e-12)


def test_a_late_rank_holds_its_neighbours_up_a_step_later():
    """Rank 0 is 2 s late in step 1: its model left before that, so ranks 1 and 7 miss it in step 2, those at
    distance d in step d + 1."""
    own_s = np.ones((6, 8))
    own_s[0, 0] = 3.0
    found = sent_before(own_s, ring(8), 0.0).ended_s
    np.testing.assert_allclose(found[0], [3, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found[1], [4, 3, 2, 2, 2, 2, 2, 3])
    np.testing.assert_allclose(found[2], [5, 4, 3, 3, 3, 3, 3, 4])
    assert ring(2)(1) == [1]  # of two ranks each has one neighbour


@pytest.mark.parametrize("drift_steps", DRIFTS)
def test_ranks_alone_are_those_of_events(drift_steps: int | None):
    own_s = uneven(6)
    expected = neighbours_by_events(own_s, lambda step, rank: set(), 0.0, drift_steps=drift_steps)
    np.testing.assert_allclose(alone(own_s, drift_steps).ended_s, expected, rtol=1e-12)


@pytest.mark.parametrize("tensors", [2, 5])
def test_a_ring_tensor_by_tensor_is_one_of_many_exchanges(tensors: int):
    """A step of two tensors is two steps, of which the second is all exchange."""
    own_s = uneven(6)
    parts = np.zeros((tensors * len(own_s), 6))
    parts[::tensors] = own_s
    expected = neighbours_by_events(parts, beside, 0.2 / tensors)[tensors - 1 :: tensors]
    found = with_neighbours(own_s, ring(6), 0.1, tensors=tensors)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)


@pytest.mark.parametrize("drift_steps", DRIFTS)
@pytest.mark.parametrize(("ranks", "neighbours"), [(4, 1), (8, 1), (8, 2)])
def test_an_exponential_graph_is_that_of_events(ranks: int, neighbours: int, drift_steps: int | None):
    own_s = uneven(ranks)

    def sources(step: int, rank: int) -> set[int]:
        """Who sends to this rank: the graph of the senders, searched."""
        powers = ranks.bit_length() - 1
        return {
            sender
            for sender in range(ranks)
            for further in range(neighbours)
            if (sender + 2 ** ((step - 1 + further) % powers)) % ranks == rank
        }

    expected = neighbours_by_events(own_s, sources, neighbours * 0.1, drift_steps=drift_steps)
    found = with_neighbours(own_s, exponential(ranks, neighbours), 0.1, drift_steps=drift_steps)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)


@pytest.mark.parametrize("exchange_s", [0.0, 0.1, 1.5])
@pytest.mark.parametrize("grace_s", [0.0, 0.2, 2.5])
@pytest.mark.parametrize(
    ("ranks", "size", "period"), [(4, 2, 5), (8, 2, 7), (8, 4, 10), (8, 8, 3), (4, 2, 1)]
)
def test_wagma_is_that_of_events(ranks: int, size: int, period: int, grace_s: float, exchange_s: float):
    """Exchanges and graces that take longer than a step too."""
    own_s = uneven(ranks)
    costs = Costs(2 * exchange_s, exchange_s, 0, 0, 0, activation_s=0.013)
    expected, fresh = (
        background_by_events(own_s, lambda s: grouping(s - 1, ranks, size), period, costs, 1, grace_s)
        if period > 1
        else (averaging_by_events(own_s, 1, 0, costs.everyone_s), None)
    )
    found = background(own_s, butterfly(ranks, size), lambda step: step % period == 0, costs, grace_s=grace_s)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)
    assert found.fresh == (pytest.approx(fresh) if fresh is not None else None)


@pytest.mark.parametrize("quorum", [1, 3, 6])
@pytest.mark.parametrize("exchange_s", [0.01, 1.5])
@pytest.mark.parametrize("period", [4, 100])
def test_eager_is_that_of_events(quorum: int, exchange_s: float, period: int):
    own_s = uneven(6)
    costs = Costs(exchange_s, 99.0, 0, 0, 0, activation_s=0.013)
    expected, fresh = background_by_events(own_s, lambda step: [tuple(range(6))], period, costs, quorum, 0.0)
    found = background(own_s, world(6), lambda step: step % period == 0, costs, quorum=quorum)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)
    assert found.fresh == pytest.approx(fresh)


def test_a_majority_is_half_of_the_ranks():
    own_s = uneven(8)
    run = methods(8, Options(5, 2))["eager_sgd, majority"](Work(own_s, np.zeros_like(own_s)), COSTS)
    expected, _ = background_by_events(own_s, lambda step: [tuple(range(8))], 5, COSTS, 4, 0.0)
    np.testing.assert_allclose(run.ended_s, expected, rtol=1e-12)


@pytest.mark.parametrize(("ranks", "copies"), [(4, 2), (6, 3), (6, 1)])
@pytest.mark.parametrize("period", [1, 7, 100])
@pytest.mark.parametrize("exchange_s", [0.1, 2.5])
def test_gradient_coding_is_that_of_events(ranks: int, copies: int, period: int, exchange_s: float):
    own_s = uneven(ranks, 80) ** 2
    expected = coding_by_events(own_s, copies, period, exchange_s)
    found = gradient_coding(own_s, copies, period, exchange_s)
    np.testing.assert_allclose(found.ended_s, expected, rtol=1e-12)


def test_what_gradient_coding_computes_grows_with_the_copies_but_not_its_delays():
    given = Work(np.ones((40, 4)), uneven(4, 40))
    run = methods(4, Options(5, 2))["gradient_coding, 2 copies"](given, COSTS)
    expected = coding_by_events(2 + given.delay_s, 2, 5, COSTS.everyone_s)
    np.testing.assert_allclose(run.ended_s, expected, rtol=1e-12)


# --- closed forms

COSTS = Costs(everyone_s=0.2, group_s=0.1, message_s=0.05, sparse_s=0.04, scalars_s=0.01, activation_s=0.001)


def test_without_delays_every_step_takes_its_time_and_its_exchange():
    steps, ranks = 100, 16
    even = Work(np.ones((steps, ranks)), np.zeros((steps, ranks)))
    step_s = {
        name: float(method(even, COSTS).ended_s[-1].max()) / steps
        for name, method in methods(ranks, Options(period=10, group_size=4)).items()
    }
    assert step_s == pytest.approx(
        {
            "allreduce": 1.2,
            "local_sgd, period 1": 1.2,
            "local_sgd, period 10": 1.02,
            "adaptive_period, mean 4": 1.05,
            "delayed_averaging": 1.0,  # it takes less than a step
            "dpsgd": 1.0,  # so do its messages
            "dpsgd, as in the paper's code": 1.1,
            "sgp, 1 neighbour": 1.05,
            "sgp, 2 neighbours": 1.1,
            "sgp, 4 neighbours": 1.2,
            "adpsgd": 1.0,
            "eager_sgd, solo": (9 * 1.201 + 1.2) / 10,
            "eager_sgd, majority": (9 * 1.201 + 1.2) / 10,
            "wagma": (9 * 1.101 + 1.2) / 10,
            "a2sgd": 1.01,
            "def": 1.04,
            "gradient_coding, 2 copies": 2.2,
        }
    )


def test_a_constant_delay_costs_allreduce_its_length_and_wagma_what_one_rank_gets():
    """320 ms for 2 of 64 ranks: each step of allreduce, and τ steps of wagma only as often as one rank is hit."""
    setting = SETTINGS["resnet50"]
    given = simulate_sync.work(setting.times, setting.delays, 64, 500)
    step_s = 128 * 256 / 53_000
    found = averaging(given.own_s, 1, 0.02).ended_s[-1]
    np.testing.assert_allclose(found, 500 * (step_s + 0.32 + 0.02))
    hits = (given.delay_s > 0).reshape(50, 10, 64).sum(axis=1).max(axis=1)
    run = background(given.own_s, butterfly(64, 8), lambda s: s % 10 == 0, Costs(0, 0, 0, 0, 0))
    np.testing.assert_allclose(run.ended_s[-1], 500 * step_s + 0.32 * hits.sum())


def test_allreduce_of_exponential_times_takes_their_expected_maximum():
    """E max of P exponentials = 1 + 1/2 + … + 1/P."""
    own_s = np.random.default_rng(0).exponential(size=(20_000, 32))
    harmonic = sum(1 / k for k in range(1, 33))
    assert averaging(own_s, 1, 0).ended_s[-1, 0] / 20_000 == pytest.approx(harmonic, rel=0.01)


def test_gradient_coding_goes_on_with_the_first_of_a_cluster():
    """Two shards take 2 s. Rank 0 comes 5 s late in step 1 and joins the others in step 4, 1 s after they began:
    that is what step 5 lasts longer when rank 1 is late."""
    own_s = np.full((7, 4), 2.0)
    own_s[0, 0] = own_s[4, 1] = 7.0
    np.testing.assert_allclose(gradient_coding(own_s, 2, 8, 0.0).ended_s[:, 0], [2, 4, 6, 8, 11, 13, 15])
    # All wait for rank 0 in step 2, which it begins at 7 s, and for rank 1 in step 6, at 20 s.
    np.testing.assert_allclose(gradient_coding(own_s, 2, 2, 0.0).ended_s[:, 0], [2, 9, 11, 13, 15, 22, 24])
    own_s = uneven(4, 50)
    np.testing.assert_allclose(
        gradient_coding(own_s, 1, 10, 0.1).ended_s, averaging(own_s, 1, 0.1).ended_s
    )  # nobody to stand in for anybody


# --- bounds


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ranks", "size", "period"), [(8, 2, 5), (16, 4, 8), (16, 16, 10)])
def test_wagma_is_between_the_slowest_rank_and_allreduce(ranks: int, size: int, period: int, seed: int):
    own_s, cost_s = uneven(ranks, 10 * period, seed), 0.3
    same = Costs(cost_s, cost_s, 0, 0, 0)
    wagma = background(own_s, butterfly(ranks, size), lambda step: step % period == 0, same).ended_s
    assert (wagma <= averaging(own_s, 1, cost_s).ended_s + 1e-9).all()
    of_periods = own_s.reshape(10, period, ranks).sum(axis=1)
    at_synchronisations = wagma[period - 1 :: period, 0]
    assert (np.diff(at_synchronisations, prepend=0) >= of_periods.max(axis=1) + cost_s - 1e-9).all()
    assert (wagma >= alone(own_s).ended_s - 1e-9).all()


def test_nobody_is_faster_than_alone_and_a_longer_period_is_not_slower():
    own_s = uneven(16, 160)
    given = Work(own_s, np.zeros_like(own_s))
    runs = {name: method(given, COSTS) for name, method in methods(16, Options(8, 4)).items()}
    for name, run in runs.items():
        if "coding" not in name:
            assert (run.ended_s >= alone(own_s).ended_s - 1e-9).all(), name
    times = [averaging(own_s, period, 0.2).ended_s[-1].max() for period in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("method", ["adpsgd", "dpsgd", "sgp, 1 neighbour"])
def test_nobody_runs_ahead_further_than_the_trainer_lets_it(method: str):
    own_s = np.ones((200, 64))
    own_s[:, 0] = 50.0
    ended_s = methods(64, Options(10, 8, drift_steps=5))[method](Work(own_s, 0 * own_s), COSTS).ended_s
    assert (ended_s[10:].min(axis=1) >= ended_s[:-10].max(axis=1)).all()


@pytest.mark.parametrize(("ranks", "most"), [(2, 1), (4, 2), (8, 2), (16, 4)])
def test_leaves_out_more_neighbours_than_sgp_takes(ranks: int, most: int):
    found = [name for name in methods(ranks, Options(10, 2, tensors=3)) if name.startswith("sgp")]
    assert max(int(name.split()[1]) for name in found) == most


# --- what goes in


def test_delays_are_those_of_a_real_run():
    delays = replace(simulate_sync.no_delay(), kind="lognormal", delay_ms=10.0, seed=3)
    given = simulate_sync.work(simulate_sync.constant(0.1), delays, 4, 20)
    for rank in range(4):
        real = [Imbalance(delays, rank, 4).seconds(step) for step in range(1, 21)]
        np.testing.assert_array_equal(given.delay_s[:, rank], real)
    assert (given.compute_s == 0.1).all()


def test_costs_are_those_of_the_network():
    costs = Costs.on(Network(bandwidth_gb_per_s=10, latency_us=1), 64, 8, parameters=25e6, kept=0.5)
    assert costs.everyone_s == pytest.approx(2 * (6e-6 + 63 / 64 * 0.01))
    assert costs.group_s == pytest.approx(2 * (3e-6 + 7 / 8 * 0.01))
    assert costs.message_s == pytest.approx(1e-6 + 0.01)
    assert costs.sparse_s == pytest.approx(2 * (6e-6 + 63 / 64 * 0.005))
    assert costs.activation_s == pytest.approx(6e-6)


def drawn(times: Times) -> Seconds:
    return times.drawn((4000, 100), np.random.default_rng(0))


def test_heavy_tails_have_the_moments_that_were_asked_for():
    seconds = drawn(heavy_tailed(least_s=1.7, median_s=2.0, mean_s=2.62, most_s=43.5))
    assert 1.7 <= seconds.min() < 1.71 and seconds.max() == 43.5
    assert np.median(seconds) == pytest.approx(2.0, rel=0.01)
    assert seconds.mean() == pytest.approx(2.62, rel=0.02)
    even = drawn(spread(0.5, 0.3, 0.2, 8.0))
    assert even.mean() == pytest.approx(0.5, rel=0.01) and even.std() == pytest.approx(0.15, rel=0.02)
    wide = lognormal(0.0, 1e9, 0.0, 1.0, 0.5)
    assert drawn(wide).mean() == pytest.approx(np.exp(0.125), rel=0.01)
    assert np.log(drawn(wide)).std() == pytest.approx(0.5, rel=0.01)


def test_a_trace_is_drawn_from():
    trace = np.sort(np.random.default_rng(1).exponential(size=500))
    times = measured(trace.tolist())
    assert drawn(times).mean() == pytest.approx(trace.mean(), rel=0.02)
    np.testing.assert_allclose(
        np.quantile(drawn(times), [0.1, 0.5, 0.9]), np.quantile(trace, [0.1, 0.5, 0.9]), rtol=0.05
    )


# --- the command


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["simulate_sync", *words])
    assert simulate_sync.main() == 0
    return capsys.readouterr().out


def test_prints_the_papers_ratios_beside_its_own(capsys, monkeypatch):
    words = ["--settings", "resnet50", "--ranks", "64", "--steps", "200"]
    found = json.loads(printed(capsys, monkeypatch, *words, "--json"))["figures"]["resnet50"]
    allreduce = next(row for row in found if row["method"] == "allreduce")
    assert allreduce["paper_wagma_over_it"] == 1.26
    assert allreduce["deviation"] == pytest.approx(allreduce["wagma_over_it"] / 1.26 - 1)
    (line,) = [
        line for line in printed(capsys, monkeypatch, *words).splitlines() if line.startswith("allreduce")
    ]
    assert "1.26×" in line


def test_takes_a_setting_of_ones_own(capsys, monkeypatch, tmp_path):
    own = ["--settings", "own", "--ranks", "16", "--steps", "100", "--parameters", "1", "--json"]
    even = printed(capsys, monkeypatch, *own, "--compute-ms", "200", "--overhead-ms", "a2sgd=50")
    step_s = {row["method"]: row["step_s"] for row in json.loads(even)["figures"]["own"]}
    assert step_s["wagma"] == pytest.approx(0.2, rel=1e-3) and step_s["a2sgd"] == pytest.approx(
        0.25, rel=1e-3
    )
    (tmp_path / "trace").write_text("1.0\n2.0\n3.0\n")
    traced = printed(capsys, monkeypatch, *own, "--trace", str(tmp_path / "trace"), "--delay-ms", "500")
    step_s = {row["method"]: row["step_s"] for row in json.loads(traced)["figures"]["own"]}
    assert step_s["adpsgd"] == pytest.approx(2.0 + 0.5 * 2 / 16, rel=0.05)


def test_refuses_what_is_no_power_of_two():
    with pytest.raises(ConfigError, match="--ranks 4 --group-size 2"):
        simulate_sync.simulate(SETTINGS["resnet50"], 6, 10)


def test_refuses_more_late_ranks_than_there_are():
    delays = replace(SETTINGS["resnet50"].delays, ranks=5)
    with pytest.raises(ConfigError, match="--late-ranks 4"):
        simulate_sync.simulate(replace(SETTINGS["resnet50"], delays=delays), 4, 10)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "at least 1"),
        (["--delay-ms", "-1"], "at least 0"),
        (["--overhead-ms", "wagna=3"], "wagna: no such method"),
        (["--trace", "/nowhere"], "No such file"),
        (["--sigma", "0.5"], "give --delay-ms"),
    ],
)
def test_refuses_arguments_that_make_no_sense(words: list[str], says: str, capsys):
    with pytest.raises(SystemExit):
        simulate_sync.parse(words)
    assert says in capsys.readouterr().err


def made_up(name: str, ranks: int, delays: str, slower: float = 1.0) -> Measured:
    """What would be measured if the model were right: exchanges of 7 ms, averages of 9 ms."""
    method = simulate_sync.VALIDATED[name]
    own_s = 0.02 + 0.005 * np.random.default_rng(5).random((50, ranks))
    exchange_s = 0.009 if name == simulate_sync.AVERAGING else 0.007
    run = method.predict(own_s + simulate_sync.delays_of(delays, ranks, 50), exchange_s, 0.009)
    return Measured(own_s, float(run.ended_s.max()) * slower, run.fresh)


def test_validation_finds_the_costs_and_no_error_where_the_model_is_right():
    """Nor does one round of three that was slow matter."""
    runs = {
        (ranks, name, delays): [made_up(name, ranks, delays, slower) for slower in (1.0, 1.5, 1.0)]
        for ranks in simulate_sync.VALIDATED_RANKS
        for name in simulate_sync.VALIDATED
        for delays in simulate_sync.DELAYS
    }
    rows = simulate_sync.compare(runs)
    assert len(rows) == 2 * len(simulate_sync.VALIDATED) * 2
    for row in rows:
        assert row["exchange_s"] == pytest.approx(
            0.009 if row["method"] == simulate_sync.AVERAGING else 0.007
        )
        assert row["error"] == pytest.approx(0, abs=1e-6)
    found = simulate_sync.summary(rows)
    assert len(found["wagma_over"]) == 2 * (len(simulate_sync.VALIDATED) - 1) * 2
    assert found["times"]["largest_error"] < 1e-6 and found["ratios"]["largest_error"] < 1e-6
    assert simulate_sync.of_summary(found).endswith("errors of ratios: median 0.0%, largest 0.0%")


@pytest.mark.slow
def test_validation_measures_real_processes():
    own_s = np.zeros((20, 4))
    own_s[4, 1] = 0.5  # one rank, in step 5
    run = simulate_sync.run_for_real(simulate_sync.VALIDATED[simulate_sync.WAGMA], 4, own_s)
    assert run.own_s.shape == (20, 4) and run.own_s.min() >= simulate_sync.STEP_S
    assert run.own_s[4, 1] >= 0.5 + simulate_sync.STEP_S
    assert run.total_s >= 20 * simulate_sync.STEP_S + 0.5
    assert run.fresh is not None and 0 < run.fresh < 1
