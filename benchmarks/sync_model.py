"""When ranks end their steps, under each way to agree: recurrences over the steps, on clocks of all ranks.

`own_s` [steps, ranks] is what each rank does by itself in each step, delays included. A rank has arrived at
the exchange of a step when it has done that, after it ended the step before. From there:

- allreduce, local SGD: at a synchronisation all ranks end at the last arrival + the cost of the exchange;
  elsewhere a rank ends when it arrives. Adaptive periods are local SGD of their mean period.
- delayed averaging: the exchange begins at the last arrival, and is met `delay_steps` steps later.
- SGP: a rank ends when it and those whose models it receives have arrived, + the cost. D-PSGD in the code of
  WAGMA-SGD's paper too.
- D-PSGD (pipeline.sync.dpsgd): models leave before the gradient. A rank ends when it has arrived and what
  came since it and its neighbours began the step is there.
- AD-PSGD: a rank ends when it arrives; its exchanges are another thread's.
- eager-SGD, WAGMA-SGD (pipeline.sync._background): an exchange is activated for all when `quorum` ranks have
  arrived, whoever they are. It begins on a rank when it is activated and the rank's exchange before is done,
  whether or not the rank has arrived; the exchange of a group is done when it has begun on all members, + the
  cost. A rank ends when it has arrived and the exchange is done. At a synchronisation exchanges begin when
  their ranks arrive.
- gradient coding: clusters of ranks compute the same shards, and the first of each cluster is enough. One
  that is late ends what it has begun, and goes on with the step at which the others then are. At a
  synchronisation all ranks compute, and the last one counts.
- Where nothing else bounds it (D-PSGD, SGP, AD-PSGD) ranks run ahead of each other only so far: at the end of
  every `drift_steps` steps a rank waits until all have done as many less (pipeline.sync._agreement).

What this leaves out: exchanges cost the same whoever takes part, and do not slow the computation down; links
are not shared between exchanges; nothing of an exchange is hidden behind the computation of its own step,
except where it begins before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.synchronisation import Network
from pipeline.sync._interface import DEFAULT_DRIFT_STEPS
from pipeline.sync.sgp import distances, powers
from pipeline.sync.wagma import grouping

Seconds = NDArray[np.float64]
Members = NDArray[np.int64]  # of the groups of a step, [groups, size]
Offsets = Callable[[int], Sequence[int]]  # to a rank from those whose messages it gets, by step from 1

SCALARS_BYTES = 8  # A2SGD's two means
MODEL_BYTES = 4  # of a parameter
PAPERS_CODE = ", as in the paper's code"  # WAGMA-SGD's


@dataclass(frozen=True)
class Work:
    """What ranks do by themselves in each step, [steps, ranks]."""

    compute_s: Seconds  # grows with the shards that a rank computes
    delay_s: Seconds  # does not

    @property
    def own_s(self) -> Seconds:
        return self.compute_s + self.delay_s


@dataclass(frozen=True)
class Run:
    ended_s: Seconds  # [steps, ranks], since the first step began
    fresh: float | None = None  # share of contributions in time, of exchanges that wait for nobody

    @property
    def steps_per_s(self) -> float:
        """Of all ranks together, each at its own pace."""
        return float((len(self.ended_s) / self.ended_s[-1]).sum())


@dataclass(frozen=True)
class Costs:
    """Seconds of an exchange, from its last participant on."""

    everyone_s: float  # of the model, or its gradient, among all ranks
    group_s: float  # among the ranks of a group
    message_s: float  # from one rank to another
    sparse_s: float  # of the blocks that are kept, among all ranks
    scalars_s: float  # of two numbers, among all ranks
    activation_s: float = 0.0  # until all ranks know that an exchange is to begin
    overhead_s: float = 0.0  # of a step, whatever the method exchanges

    @classmethod
    def on(cls, network: Network, ranks: int, group: int, parameters: float, kept: float) -> Costs:
        """Activation is the paper's binomial tree: log₂ P messages without content, one after another."""
        size = parameters * MODEL_BYTES
        latency_s = network.latency_us * 1e-6
        return cls(
            everyone_s=network.all_reduce_s(ranks, size),
            group_s=network.all_reduce_s(group, size),
            message_s=latency_s + size / (network.bandwidth_gb_per_s * 1e9),
            sparse_s=network.all_reduce_s(ranks, kept * size),
            scalars_s=network.all_reduce_s(ranks, SCALARS_BYTES),
            activation_s=network.gather_s(ranks, 0),
        )


# --- recurrences


def averaging(own_s: Seconds, period: int, exchange_s: float) -> Run:
    """Allreduce (period 1), local SGD."""
    clock, ended = _start(own_s)
    for step, own in enumerate(own_s, 1):
        clock = clock + own
        if step % period == 0:
            clock = np.full_like(clock, clock.max() + exchange_s)
        ended[step - 1] = clock
    return Run(ended)


def delayed_averaging(own_s: Seconds, period: int, delay_steps: int, exchange_s: float) -> Run:
    """1 ≤ delay_steps ≤ period: one exchange is under way at a time."""
    clock, ended = _start(own_s)
    done_s = 0.0
    for step, own in enumerate(own_s, 1):
        clock = clock + own
        if step > delay_steps and (step - delay_steps) % period == 0:
            clock = np.maximum(clock, done_s)
        if step % period == 0:
            done_s = clock.max() + exchange_s
        ended[step - 1] = clock
    return Run(ended)


def with_neighbours(
    own_s: Seconds,
    offsets: Offsets,
    message_s: float,
    *,
    tensors: int = 1,
    drift_steps: int | None = None,
) -> Run:
    """SGP: rank r receives from the ranks r − offset, and sends as many messages in turn. Where models are
    exchanged tensor by tensor a delay travels as many hops within the step."""
    clock, ended = _start(own_s)
    for step, own in enumerate(own_s, 1):
        clock = clock + own
        now = offsets(step)
        for _ in range(tensors):
            latest = _latest(clock, now)
            if (latest == clock).all():
                break
            clock = latest
        clock = _heard(clock + len(now) * message_s, ended, step, drift_steps)
        ended[step - 1] = clock
    return Run(ended)


def sent_before(own_s: Seconds, offsets: Offsets, message_s: float, *, drift_steps: int | None = None) -> Run:
    """D-PSGD: the same messages, on their way since both ends began the step."""
    clock, ended = _start(own_s)
    for step, own in enumerate(own_s, 1):
        now = offsets(step)
        clock = np.maximum(clock + own, _latest(clock, now) + len(now) * message_s)
        clock = _heard(clock, ended, step, drift_steps)
        ended[step - 1] = clock
    return Run(ended)


def ring(ranks: int) -> Offsets:
    offsets = sorted({1, ranks - 1})
    return lambda step: offsets


def exponential(ranks: int, neighbours: int) -> Offsets:
    """SGP's graph."""
    return lambda step: distances(step, ranks, neighbours)


def alone(own_s: Seconds, drift_steps: int | None = None) -> Run:
    clock, ended = _start(own_s)
    for step, own in enumerate(own_s, 1):
        clock = _heard(clock + own, ended, step, drift_steps)
        ended[step - 1] = clock
    return Run(ended)


def background(
    own_s: Seconds,
    members_of: Callable[[int], Members],
    waits: Callable[[int], bool],
    costs: Costs,
    *,
    quorum: int = 1,
    grace_s: float = 0.0,
) -> Run:
    """Eager-SGD, WAGMA-SGD. An exchange whose group is all ranks costs `everyone_s`."""
    clock, ended = _start(own_s)
    done = np.zeros_like(clock)
    before = np.full_like(clock, -np.inf)
    fresh = []
    for step, own in enumerate(own_s, 1):
        arrived = clock + own
        if waits(step):
            done = np.full_like(done, arrived.max() + costs.everyone_s)
        else:
            activated_s = np.partition(arrived, quorum - 1)[quorum - 1] + costs.activation_s
            begins = np.maximum(done, activated_s)
            # A communication thread gives its own main thread some grace if that is one step behind.
            close = (before <= begins) & (begins < arrived)
            begins = np.where(close, np.minimum(arrived, begins + grace_s), begins)
            fresh.append(float((arrived <= begins).mean()))
            members = members_of(step)
            exchange_s = costs.everyone_s if members.shape[1] == len(clock) else costs.group_s
            done[members] = begins[members].max(axis=1, keepdims=True) + exchange_s
        clock, before = np.maximum(arrived, done), arrived
        ended[step - 1] = clock
    return Run(ended, float(np.mean(fresh)) if fresh else None)


def butterfly(ranks: int, size: int) -> Callable[[int], Members]:
    """The groups of WAGMA-SGD by step, from 1."""
    groups = [np.array(grouping(t, ranks, size)) for t in range(ranks.bit_length() - 1)]
    return lambda step: groups[(step - 1) % len(groups)]


def world(ranks: int) -> Callable[[int], Members]:
    everyone = np.arange(ranks)[None]
    return lambda step: everyone


def gradient_coding(own_s: Seconds, copies: int, period: int, exchange_s: float) -> Run:
    """Clusters are of `copies` ranks. `own_s` is for all shards of a cluster."""
    free, ended = _start(own_s)
    done_s = 0.0
    for step, own in enumerate(own_s, 1):
        begins = np.maximum(free, done_s)
        ready = begins + own
        if step % period == 0:
            begun_s, free = float(ready.max()), ready
        else:
            begun_s = float(ready.reshape(-1, copies).min(axis=1).max())
            free = np.where(begins < begun_s, ready, free)  # who comes when it has begun leaves it out
        done_s = begun_s + exchange_s
        ended[step - 1] = done_s
    return Run(ended)


def _start(own_s: Seconds) -> tuple[Seconds, Seconds]:
    """Clocks [ranks] at the first step, and room for the times at which steps end."""
    return np.zeros(own_s.shape[1]), np.empty_like(own_s)


def _latest(clock: Seconds, offsets: Sequence[int]) -> Seconds:
    """Of each rank and those that send to it."""
    latest: Seconds = np.max([clock, *(np.roll(clock, offset) for offset in offsets)], axis=0)
    return latest


def _heard(clock: Seconds, ended: Seconds, step: int, drift_steps: int | None) -> Seconds:
    """Clocks at the end of a step, when what all ranks sent `drift_steps` before has been read."""
    if drift_steps is None or step % drift_steps or step == drift_steps:
        return clock
    return np.maximum(clock, ended[step - drift_steps - 1].max())


# --- the methods


@dataclass(frozen=True)
class Options:
    """Of the methods."""

    period: int  # of WAGMA-SGD, and of what is compared with it
    group_size: int
    adaptive_period: int = 4  # Jiang and Agrawal's first one
    delay_steps: int = 1
    copies: int = 2
    grace_s: float = 0.0
    tensors: int = 1  # in which the paper's code exchanges a model with neighbours
    drift_steps: int = DEFAULT_DRIFT_STEPS  # of methods without a period


Method = Callable[[Work, Costs], Run]


def methods(ranks: int, options: Options) -> dict[str, Method]:
    """Of so many ranks, a power of two."""
    period, copies, drift_steps = options.period, min(options.copies, ranks), options.drift_steps

    def at_period(step: int) -> bool:
        return step % period == 0

    def eager(quorum: int) -> Method:
        return lambda work, costs: background(
            _own(work, costs), world(ranks), at_period, costs, quorum=quorum
        )

    def sgp(neighbours: int) -> Method:
        return lambda work, costs: with_neighbours(
            _own(work, costs), exponential(ranks, neighbours), costs.message_s, drift_steps=drift_steps
        )

    def in_papers_code(offsets: Offsets) -> Method:
        return lambda work, costs: with_neighbours(
            _own(work, costs), offsets, costs.message_s, tensors=options.tensors
        )

    def local_sgd(period: int) -> Method:
        return lambda work, costs: averaging(_own(work, costs), period, costs.everyone_s)

    papers_sgp: dict[str, Method] = {}
    if options.tensors > 1 and powers(ranks) >= 2:  # in one piece it is no other than the row without
        papers_sgp[f"sgp, 2 neighbours{PAPERS_CODE}"] = in_papers_code(exponential(ranks, 2))
    return {
        "allreduce": local_sgd(1),
        "local_sgd, period 1": local_sgd(1),
        f"local_sgd, period {period}": local_sgd(period),
        f"adaptive_period, mean {options.adaptive_period}": local_sgd(options.adaptive_period),
        "delayed_averaging": lambda work, costs: delayed_averaging(
            _own(work, costs), period, options.delay_steps, costs.everyone_s
        ),
        "dpsgd": lambda work, costs: sent_before(
            _own(work, costs), ring(ranks), costs.message_s, drift_steps=drift_steps
        ),
        f"dpsgd{PAPERS_CODE}": in_papers_code(ring(ranks)),
        **{
            f"sgp, {number} neighbour{'s' if number > 1 else ''}": sgp(number)
            for number in (1, 2, 4)
            if number <= powers(ranks)  # more are refused
        },
        **papers_sgp,
        "adpsgd": lambda work, costs: alone(_own(work, costs), drift_steps),
        "eager_sgd, solo": eager(1),
        "eager_sgd, majority": eager(-(-ranks // 2)),
        "wagma": lambda work, costs: background(
            _own(work, costs),
            butterfly(ranks, options.group_size),
            at_period,
            costs,
            grace_s=options.grace_s,
        ),
        "a2sgd": lambda work, costs: averaging(_own(work, costs), 1, costs.scalars_s),
        "def": lambda work, costs: averaging(_own(work, costs), 1, costs.sparse_s),
        f"gradient_coding, {copies} copies": lambda work, costs: gradient_coding(
            _own(Work(copies * work.compute_s, work.delay_s), costs), copies, period, costs.everyone_s
        ),
    }


def _own(work: Work, costs: Costs) -> Seconds:
    return work.own_s + costs.overhead_s
