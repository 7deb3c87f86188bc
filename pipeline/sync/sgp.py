"""SGP: stochastic gradient push (Assran et al. 2019, arXiv 1811.10792, Algorithm 1).

Replicas average by push-sum over a directed graph that changes with the step. A replica holds a numerator x
and a weight w, first its model and 1; the model is z = x/w. In step k it computes the gradient at z and
applies it to x; then it keeps 1/(n+1) of x and of w and sends as much to each of n out-neighbours:

    x ← Σ_j p_ij (x_j − γ g(z_j)),   w ← Σ_j p_ij w_j,   z = x/w,

over itself and the in-neighbours, for which alone it waits (under nccl for the out-neighbours too). The
columns of p sum to 1: the mean of x moves by the gradients only and Σ w stays P, whatever the graph. Here
every rank has as many in-neighbours as out-neighbours, and w stays 1 to rounding.

The graph is the paper's directed exponential one: the distances to out-neighbours are n consecutive of the
powers 2^0 … 2^⌊log₂(P−1)⌋, beginning with the k-th, k = step − 1, in a cycle. For P a power of two these are
log₂ P powers, and with n = 1 as many steps average exactly.
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


class Method(_interface.Method):
    settings = frozenset(["neighbours"])

    @staticmethod
    def check(config: Config) -> list[str]:
        ranks, wanted = config.parallel.replicate, config.sync.neighbours
        most = powers(ranks)
        if wanted <= most:
            return []
        return [
            f"sync.neighbours={wanted}: of parallel.replicate={ranks} ranks sync=sgp sends to those at "
            f"distance {', '.join(str(1 << power) for power in range(most))}. Nearest sync.neighbours: {most}"
        ]

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        from pipeline.sync._messages import Messages

        super().__init__(config, ranks, replica)
        # Whoever has not come to this rank's message of some step is waited for powers − 1 steps later in any
        # case: in that time what it sends reaches every rank.
        self._messages = Messages(unread=powers(ranks.world_size) - 1)
        self._numerator = replica.weights()
        self._weight = self._numerator.new_ones(1)

    def before_step(self, step: int, rate: float) -> None:
        self.replica.set_weights(self._numerator)

    def after_step(self, step: int) -> None:
        import torch

        rank, ranks = self.ranks.rank, self.ranks.world_size
        steps = distances(step, ranks, self.config.neighbours)
        share = torch.cat([self.replica.weights(), self._weight]).div_(1 + len(steps))
        self._messages.start(share, [(rank + d) % ranks for d in steps], [(rank - d) % ranks for d in steps])
        total = share.clone()
        for pushed in self._messages.finish():
            total.add_(pushed)
        self._numerator, self._weight = total[:-1], total[-1:]
        self.replica.set_weights(self._numerator / self._weight)

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"numerator": self._numerator.clone(), "weight": self._weight.clone()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._numerator, self._weight = state["numerator"], state["weight"]


def powers(ranks: int) -> int:
    """How many powers of two are distances between different ranks: ⌊log₂(P−1)⌋ + 1."""
    return (ranks - 1).bit_length()


def distances(step: int, ranks: int, neighbours: int) -> list[int]:
    """To a rank's out-neighbours in this step, and from its in-neighbours."""
    return [1 << (step - 1 + index) % powers(ranks) for index in range(neighbours)]
