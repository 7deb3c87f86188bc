"""AD-PSGD: asynchronous decentralised parallel SGD (Lian et al. 2018, arXiv 1710.06952, Algorithm 1).

While a replica computes a gradient at a copy of its weights, the weights are averaged with those of a random
other replica; then the update is added to what has become of them:

    x_i, x_j ← (x_i + x_j)/2,   x_i ← x_i + (W' − W),

W the copy, W' what the optimizer made of it. Nobody waits for another's main thread. So that no two ranks
wait for each other the ranks are halves of a bipartite graph, as in the paper: the even ones are active and
ask, each once in a step; the odd ones are passive and a thread of theirs answers, one rank at a time. An
active rank waits, before it updates, for the answer of that thread, if its own gradient took less.

Here x_j is the passive rank's as it is when it answers, x_i the active one's at the beginning of its step,
the same as the copy W: nothing else changes it meanwhile, so an active rank needs no thread. Who asks whom
follows from the seed and the step; in what order, and so the result, depends on the ranks' speed.
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

_ABORT_WAIT_S = 2.0


class Method(_interface.Method):
    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        from pipeline.sync._messages import Messages
        from pipeline.sync._shared import Requests, Shared

        super().__init__(config, ranks, replica)
        self._seed = config.seed
        self._messages = Messages("gloo")
        self._requests = Requests(ranks)
        self._shared: Shared | None = None  # of a passive rank
        if ranks.rank % 2:
            self._shared = Shared(ranks.rank, replica.weights().cpu(), self._requests, self._messages.group)
        self._asked = 0  # requests that this passive rank has to answer for the steps that it has done
        self._answered = 0  # of these, those in its copy
        self._averaged = 0  # times that others' weights came into this rank's in the step just done

    def start(self, step: int) -> None:
        if self._shared:
            self._copy = self.replica.weights().cpu()
            self._shared.start()

    def before_backward(self, step: int) -> None:
        if self._shared:
            return
        self._copy = self.replica.weights().cpu()
        passive = partners(self._seed, step, self.ranks.world_size)[self.ranks.rank // 2]
        self._messages.start(self._copy, [passive], [passive])
        self._requests.put(passive, str(self.ranks.rank))

    def after_step(self, step: int) -> None:
        updated = self.replica.weights().cpu()
        if self._shared:
            self._asked += partners(self._seed, step, self.ranks.world_size).count(self.ranks.rank)
            self._copy, answered = self._shared.move(updated.sub_(self._copy))
            self._averaged, self._answered = answered - self._answered, answered
            self.replica.set_weights(self._copy)
        else:
            (theirs,) = self._messages.finish()
            self.replica.set_weights(updated.add_(theirs.sub_(self._copy).div_(2)))
            self._averaged = 1

    def settle(self) -> None:
        if self._shared:
            self._copy = self._shared.settled(self._asked)
            self.replica.set_weights(self._copy)

    def observed(self) -> Mapping[str, float]:
        return {"averaged": float(self._averaged)}

    def state(self) -> Mapping[str, torch.Tensor]:
        """With all ranks' requests for the steps that they have done."""
        return {"shared": self._shared.settled(self._asked)} if self._shared else {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if self._shared:
            self._shared.weights = state["shared"]

    def close(self) -> None:
        import torch.distributed as dist

        from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT

        if self._shared:
            self._shared.end(COLLECTIVE_TIMEOUT.total_seconds())
        dist.barrier()  # rank 0 has the store, and must not leave before the others

    def abort(self) -> None:
        if self._shared:
            self._shared.end(_ABORT_WAIT_S)


def partners(seed: int, step: int, ranks: int) -> list[int]:
    """The passive rank that each active one, 0, 2, 4 …, asks in this step."""
    import numpy as np

    drawn = np.random.default_rng([seed, step]).integers(ranks // 2, size=(ranks + 1) // 2)
    return [2 * int(index) + 1 for index in drawn]
