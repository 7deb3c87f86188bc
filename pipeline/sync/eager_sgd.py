"""Eager-SGD: partial allreduce of gradients (Li et al. 2020, arXiv 1908.04207).

In every step gradients are summed over all P replicas as soon as a quorum of them has one; each steps by

    g_t = Σ/P.

A replica that is late takes part with what its send buffer holds: zeros, or what is left over from earlier
steps. Its gradient is added to the buffer and goes into the next exchange, so that none is lost or counted
twice; every `sync.period` steps all replicas wait for each other, and nothing is left over.

The quorum is one replica (`solo`) or at least P/2 (`majority`). The paper implements the latter by a replica
drawn at random that begins the step; this counts those that have come, as its abstract and Li et al. 2021
(arXiv 2005.00124, section VI) word it. In the paper a replica that is late by several steps finds only the
newest sum, so that models drift apart and are averaged now and then. Here the sums wait for it: all replicas
are one model after the same step, bit for bit. What late replicas have left over when the run ends, less than
a period's gradients, is not applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._replica import Replica


class Method(_interface.Exchanging):
    settings = frozenset(["period", "quorum"])
    tests_batches = True

    @staticmethod
    def check(config: Config) -> list[str]:
        return _interface.check_period(config)

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        from pipeline.sync._background import Background

        super().__init__(config, ranks, replica)
        self.background = Background(
            ranks,
            replica.weights().zero_(),
            self.ends_period,
            adds=True,
            quorum=quorum(config),
        )

    def before_step(self, step: int, rate: float) -> None:
        self.background.contribute(step, self.replica.gradient())
        done = self.background.result(step)
        self.replica.set_gradient(done.total.div_(done.members))
        # Of the steps of this rank that are not in a sum yet, the oldest will be this much late.
        self.staleness = step - done.contributed

    def observed(self) -> Mapping[str, float]:
        return self.lateness()

    def state(self) -> Mapping[str, torch.Tensor]:
        # A copy: a rank that goes on empties its buffer while others still save.
        return {"left_over": self.background.buffer.clone()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.background.buffer = state["left_over"]


def quorum(config: Config) -> int:
    """Replicas with whose gradients an exchange begins."""
    return 1 if config.sync.quorum == "solo" else -(-config.parallel.replicate // 2)
