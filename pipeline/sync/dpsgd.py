"""D-PSGD: decentralised parallel SGD on a ring (Lian et al. 2017, arXiv 1705.09056, Algorithm 1).

In every step a replica mixes its weights with those of its two neighbours and applies the gradient that it
computed at its own weights before they were mixed:

    x_{k+1,i} = Σ_j W_ij x_{k,j} − γ g(x_{k,i}),   W_ij = 1/3 for j = i and its neighbours, else 0.

So the weights travel while the gradient is computed. Of two ranks each is the other's only neighbour, and
W_ij = 1/2. A replica waits for its neighbours only: one that is late holds up those at distance d after d
more steps. The optimizer, in place of the paper's SGD, moves the mixed weights; its moments stay at home.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._replica import Replica


class Method(_interface.Method):
    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        from pipeline.sync._messages import Messages

        super().__init__(config, ranks, replica)
        self._neighbours = neighbours(ranks.rank, ranks.world_size)
        self._messages = Messages()

    def before_backward(self, step: int) -> None:
        self._own = self.replica.weights()
        self._messages.start(self._own, self._neighbours, self._neighbours)

    def before_step(self, step: int, rate: float) -> None:
        mixed = self._own.clone()
        for weights in self._messages.finish():
            mixed.add_(weights)
        self.replica.set_weights(mixed.div_(1 + len(self._neighbours)))


def neighbours(rank: int, ranks: int) -> list[int]:
    """Of a rank on a ring; a single one where there are two ranks."""
    return sorted({(rank - 1) % ranks, (rank + 1) % ranks})
