"""When ranks end their steps, under each way to agree: recurrences over the steps, on clocks of all ranks.

`own_s` [steps, ranks] is what each rank does by itself in each step, delays included. A rank has arrived at
the exchange of a step when it has done that, after it ended the step before. From there:

- allreduce, local SGD: at a synchronisation all ranks end at the last arrival + the cost of the exchange;
  elsewhere a rank ends when it arrives. Adaptive periods are local SGD of their mean period.
- delayed averaging: the exchange begins at the last arrival, and is met `delay_steps` steps later.
- D-PSGD, SGP: a rank ends when it and those whose models it receives have arrived, + the cost.
- AD-PSGD: a rank ends when it arrives; its exchanges are another thread's.
- eager-SGD, WAGMA-SGD (pipeline.sync._background): an exchange is activated for all when `quorum` ranks have
  arrived, whoever they are. It begins on a rank when it is activated and the rank's exchange before is done,
  whether or not the rank has arrived; the exchange of a group is done when it has begun on all members, + the
  cost. A rank ends when it has arrived and the exchange is done. At a synchronisation exchanges begin when
  their ranks arrive.
- gradient coding: clusters of ranks compute the same shards, and the first of each cluster is enough. One
  that is late ends what it has begun, and goes on with the step at which the others then are.

What this leaves out: exchanges cost the same whoever takes part, and do not slow the computation down; links
are not shared between exchanges; nothing of an exchange is hidden behind the computation of its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.synchronisation import Network
from pipeline.sync.wagma import grouping

Seconds = NDArray[np.float64]
Members = NDArray[np.int64]  # of the groups of a step, [groups, size]

SCALARS_BYTES = 8  # A2SGD's two means
MODEL_BYTES = 4  # of a parameter
BY_TENSOR = ", by tensor"


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
    own_s: Seconds, offsets: Callable[[int], Sequence[int]], message_s: float, tensors: int = 1
) -> Run:
    """D-PSGD, SGP: rank r receives from the ranks r − offset, and sends as many messages in turn. Where
    models are exchanged tensor by tensor a delay travels as many hops within the step."""
    clock, ended = _start(own_s)
    for step, own in enumerate(own_s, 1):
        clock = clock + own
        now = offsets(step)
        for _ in range(tensors):
            latest = np.max([clock, *(np.roll(clock, offset) for offset in now)], axis=0)
            if (latest == clock).all():
                break
            clock = latest
        clock = clock + len(now) * message_s
        ended[step - 1] = clock
    return Run(ended)


def ring(step: int) -> Sequence[int]:
    return (1, -1)


def exponential(ranks: int, neighbours: int) -> Callable[[int], Sequence[int]]:
    """SGP's graph: 2⁰, 2¹, … in turn, several neighbours of a step being successive powers."""
    powers = ranks.bit_length() - 1

    def offsets(step: int) -> Sequence[int]:
        return sorted({1 << (step - 1 + further) % powers for further in range(neighbours)})

    return offsets


def alone(own_s: Seconds) -> Run:
    return Run(np.cumsum(own_s, axis=0))


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


def gradient_coding(work: Work, copies: int, exchange_s: float) -> Run:
    """Every rank of a cluster of `copies` computes all `copies` shards of it, which takes so much longer."""
    own_s = copies * work.compute_s + work.delay_s
    free, ended = _start(own_s)
    done_s = 0.0
    for index, own in enumerate(own_s):
        begins = np.maximum(free, done_s)
        ready = begins + own
        done_s = float(ready.reshape(-1, copies).min(axis=1).max()) + exchange_s
        free = np.where(begins < done_s, ready, free)  # who was still at an earlier step leaves this one out
        ended[index] = done_s
    return Run(ended)


def _start(own_s: Seconds) -> tuple[Seconds, Seconds]:
    """Clocks [ranks] at the first step, and room for the times at which steps end."""
    return np.zeros(own_s.shape[1]), np.empty_like(own_s)


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
    tensors: int = 1  # in which a model may be exchanged with neighbours


Method = Callable[[Work, Costs], Run]


def methods(ranks: int, options: Options) -> dict[str, Method]:
    """Of so many ranks, a power of two."""
    period, copies = options.period, min(options.copies, ranks)

    def at_period(step: int) -> bool:
        return step % period == 0

    def never(step: int) -> bool:
        return False

    def eager(quorum: int) -> Method:
        return lambda work, costs: background(_own(work, costs), world(ranks), never, costs, quorum=quorum)

    def gossip(offsets: Callable[[int], Sequence[int]], tensors: int = 1) -> Method:
        return lambda work, costs: with_neighbours(_own(work, costs), offsets, costs.message_s, tensors)

    def local_sgd(period: int) -> Method:
        return lambda work, costs: averaging(_own(work, costs), period, costs.everyone_s)

    by_tensor: dict[str, Method] = {}
    if options.tensors > 1:
        by_tensor = {
            f"dpsgd{BY_TENSOR}": gossip(ring, options.tensors),
            f"sgp, 2 neighbours{BY_TENSOR}": gossip(exponential(ranks, 2), options.tensors),
        }
    return {
        "allreduce": local_sgd(1),
        "local_sgd, period 1": local_sgd(1),
        f"local_sgd, period {period}": local_sgd(period),
        f"adaptive_period, mean {options.adaptive_period}": local_sgd(options.adaptive_period),
        "delayed_averaging": lambda work, costs: delayed_averaging(
            _own(work, costs), period, options.delay_steps, costs.everyone_s
        ),
        "dpsgd": gossip(ring),
        "sgp, 1 neighbour": gossip(exponential(ranks, 1)),
        "sgp, 2 neighbours": gossip(exponential(ranks, 2)),
        "sgp, 4 neighbours": gossip(exponential(ranks, 4)),
        **by_tensor,
        "adpsgd": lambda work, costs: alone(_own(work, costs)),
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
            Work(work.compute_s, work.delay_s + costs.overhead_s), copies, costs.everyone_s
        ),
    }


def _own(work: Work, costs: Costs) -> Seconds:
    return work.own_s + costs.overhead_s
