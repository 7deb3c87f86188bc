"""A method alone, without the trainer: replicas of a small vector on real ranks, with plain SGD, delays to order
and a log of everything, from which a test can compute again what the method should have done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pipeline.stopping
import pipeline.train
from pipeline.config import Config
from pipeline.store import RunDirectory
from pipeline.sync import method_class
from pipeline.sync._replica import Replica
from tests.distributed import gloo_ranks, ranks_of, train_here, train_rank
from tests.support import config

WEIGHTS = 1000
RATE = 0.1

Vectors = NDArray[np.float32]  # [steps, WEIGHTS]
Delays = Mapping[tuple[int, int], float]  # (rank, step) -> seconds before the gradient


@dataclass
class Log:
    """Of one rank, by step (index 0 is step 1)."""

    start: NDArray[np.float32]  # weights before the first step
    gradient: list[NDArray[np.float32]] = field(default_factory=list)  # as computed; 0 where it was not
    applied: list[NDArray[np.float32]] = field(default_factory=list)  # what the optimizer got
    own: list[NDArray[np.float32]] = field(default_factory=list)  # weights after the optimizer: W'
    after: list[NDArray[np.float32]] = field(default_factory=list)  # weights after the method: W
    observed: list[Mapping[str, float]] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)  # since the first step began
    waited_s: list[float] = field(default_factory=list)  # in the method
    state: tuple[torch.Tensor, Mapping[str, torch.Tensor]] | None = (
        None  # weights and the method's, at the end
    )


def late(ranks: int, steps: int, delay_s: float) -> Delays:
    """Two random ranks in every step, as in the paper's experiments."""
    random = np.random.default_rng(7)
    chosen = ((step, random.choice(ranks, 2, replace=False)) for step in range(1, steps + 1))
    return {(int(rank), step): delay_s for step, pair in chosen for rank in pair}


def trial(
    ranks: int,
    *overrides: str,
    steps: int,
    delays: Delays | None = None,
    step_s: float = 0.005,
    saved: Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]] | None = None,
    first: int = 1,
) -> list[Log]:
    """The logs by rank. `overrides` name the method: sync=wagma. Gradients pull every rank to a place of its
    own, with noise. `saved`, `first`: go on from the `state` of earlier logs."""
    return gloo_ranks(ranks, _rank, ranks, overrides, steps, dict(delays or {}), step_s, saved, first)


def _rank(
    rank: int,
    ranks: int,
    overrides: Sequence[str],
    steps: int,
    delays: Delays,
    step_s: float,
    saved: Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]] | None,
    first: int,
) -> Log:
    composed = config("parallel=ddp", f"parallel.replicate={ranks}", "batch.size=128", *overrides)
    model = nn.Linear(WEIGHTS, 1, bias=False)
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    replica = Replica(model, ranks_of(composed, rank))
    if saved:
        replica.set_weights(saved[rank][0])
    method = method_class(composed.sync.method)(composed, ranks_of(composed, rank), replica)
    if saved:
        method.load_state(saved[rank][1])
    method.start(first - 1)
    log = Log(replica.weights().numpy())
    torch.distributed.barrier()
    began = time.perf_counter()
    for step in range(first, first + steps):
        waited = _timed(method.before_backward, step)
        gradient = torch.zeros(WEIGHTS)
        if not method.decided(step):
            time.sleep(step_s + delays.get((rank, step), 0))
            for share in method.shares:
                gradient += gradient_at(replica.weights(), share, step)
        log.gradient.append(gradient.numpy().copy())
        replica.set_gradient(gradient)
        waited += _timed(method.before_step, step, RATE)
        log.applied.append(replica.gradient().numpy())
        replica.set_weights(replica.weights() - RATE * replica.gradient())
        log.own.append(replica.weights().numpy())
        waited += _timed(method.after_step, step)
        log.after.append(replica.weights().numpy())
        log.observed.append(dict(method.observed()))
        log.ended_s.append(time.perf_counter() - began)
        log.waited_s.append(waited)
    torch.distributed.barrier()
    log.state = (replica.weights(), {k: v.clone() for k, v in method.state().items()})
    method.close()
    return log


def stopped_once(composed: Config) -> RunDirectory:
    """A run through the real trainer, stopped on request at its first checkpoint and then resumed."""
    RunDirectory.of(composed).freeze(composed)
    gloo_ranks(composed.parallel.world_size, _stopped_rank, composed)
    run = RunDirectory.of(composed)
    run.clear_stop()
    return train_here(composed, attempt=2)


def _stopped_rank(rank: int, composed: Config) -> None:
    class Stopped(pipeline.train.Trainer):
        def step(self) -> None:
            if self.ranks.is_main:
                self.run.request_stop()
            super().step()

    pipeline.train.Trainer = Stopped
    pipeline.stopping.STOP_INTERVAL_S = 0.0
    train_rank(rank, composed, str(RunDirectory.of(composed).path))


def gradient_at(weights: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    noise = np.random.default_rng([rank, step]).normal(size=len(weights))
    return weights - (rank + 1) + torch.from_numpy(noise).float()


def _timed(call: Callable[..., None], *arguments: float) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began
