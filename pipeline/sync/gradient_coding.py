"""Gradient coding: the exact gradient of the batch in spite of late ranks (Tandon et al. 2017, arXiv
1612.03301), by their fractional repetition code.

The P ranks form clusters of r = `sync.redundancy`. Each rank computes the sum of the gradients of all r
shares of its cluster, r times the work, and the first of every cluster to have it contributes it:

    g = (1/P) Σ_clusters Σ_{shares of the cluster} g_share,

so up to r − 1 ranks of each cluster can be late and nobody waits. A rank that comes to a step that the others
have decided already computes nothing and applies the result; every `sync.period` steps all wait for each
other, which bounds how many results can wait for it. Clusters are static, of consecutive ranks: the
assignment from step to step by who was late before (Buyukates et al., arXiv 2103.01206) is not done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._replica import Replica


class Method(_interface.Exchanging):
    settings = frozenset(["period", "redundancy"])

    @staticmethod
    def check(config: Config) -> list[str]:
        ranks, redundancy = config.parallel.replicate, config.sync.redundancy
        problems = []
        if config.data.distribution == "by_rank":
            problems.append(
                "data.distribution=by_rank: under sync=gradient_coding ranks compute each other's shares. "
                "Use data.distribution=shared"
            )
        if ranks % redundancy == 0:
            return problems
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - redundancy))
        return [
            *problems,
            f"sync.redundancy={redundancy} parallel.replicate={ranks}: sync=gradient_coding needs clusters "
            f"of equal size. Nearest sync.redundancy: {nearest}",
        ]

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        from pipeline.sync._background import Background

        super().__init__(config, ranks, replica)
        self.background = Background(
            ranks,
            replica.weights().zero_(),
            self.ends_period,
            cluster_size=self.config.redundancy,
        )
        self._skipped = self._contributed = False

    @property
    def shares(self) -> Sequence[int]:
        size = self.config.redundancy
        first = self.ranks.data_rank // size * size
        return range(first, first + size)

    def decided(self, step: int) -> bool:
        self._skipped = self.background.begun(step)
        return self._skipped

    def before_step(self, step: int, rate: float) -> None:
        if not self._skipped:
            self.background.contribute(step, self.replica.gradient())
        done = self.background.result(step)
        self._contributed = done.contributed == step
        self.replica.set_gradient(done.total.div_(done.members))

    @property
    def loss_counts(self) -> bool:
        return self._contributed

    def observed(self) -> Mapping[str, float]:
        return {"skipped": float(self._skipped)}
