"""DEF: detached error feedback with random block sparsification (Xu and Huang 2022, arXiv 2004.05298).

In every step a replica adds what its optimizer would do to what it has not sent yet, and all send the same
random block of it, C, `sync.block_share` of the vector:

    p = γ m + e,    x ← x − mean_i C(p_i),    e ← p − C(p),

with the gradient in m taken at x − λe, λ = `sync.detach`; λ = 0 is plain error feedback. All replicas hold
the same x, to the bit; e is each one's own.

As in the authors' program (github.com/anxuthu/DEF) the momentum m is the replica's own and runs before the
compression, and 1/64 and λ = 0.3 are their settings. So clipping is of the own gradient and loses nothing of
other steps. γ m is what the optimizer does to the weights, so it holds weight decay, taken at x (theirs at
x − λe), and nothing is divided by the rate. They evaluate x − mean e; here x is, while `train/loss` is the
loss at x − λe: that is no comparison with other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.batch import schedule_class
from pipeline.sync import _interface

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._replica import Replica


class Method(_interface.Method):
    settings = frozenset(["block_share", "detach"])
    tests_batches = True

    @staticmethod
    def check(config: Config) -> list[str]:
        share, detach, problems = config.sync.block_share, config.sync.detach, []
        if config.optim.name != "sgd":
            problems.append(
                f"optim={config.optim.name}: sync=def is a form of SGD with momentum. Use optim=sgd"
            )
        if share > 1:
            problems.append(
                f"sync.block_share={share}: a share of the weights, above 0 and at most 1. "
                f"Nearest sync.block_share: 1"
            )
        if not 0 <= detach <= 1:
            problems.append(
                f"sync.detach={detach}: must lie between 0 and 1. Nearest sync.detach: "
                f"{min(max(0, detach), 1)}"
            )
        elif detach and schedule_class(config.batch.schedule)(config).needs:
            problems.append(
                f"batch={config.batch.schedule} sync.detach={detach}: compares gradients, but replicas take "
                f"theirs at different weights. Nearest sync.detach: 0, or use a planned batch"
            )
        return problems

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        super().__init__(config, ranks, replica)
        self._seed = config.seed
        self._agreed = replica.weights()  # x
        self._error = self._agreed.new_zeros(len(self._agreed))  # e

    def before_backward(self, step: int) -> None:
        self._agreed = self.replica.weights()
        self.replica.set_weights(self._agreed - self.config.detach * self._error)

    def before_step(self, step: int, rate: float) -> None:
        self.replica.set_weights(self._agreed)

    def after_step(self, step: int) -> None:
        self._error.add_(self._agreed - self.replica.weights())  # p
        block = self._block(step)
        mean = self.replica.averaged(self._error[block])
        self._error[block] = 0
        self._agreed[block] -= mean
        self.replica.set_weights(self._agreed)

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"error": self._error}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._error = state["error"]

    def _block(self, step: int) -> torch.Tensor:
        """Indices; from any weight on and around the end, so that all weights are sent equally often."""
        import numpy as np
        import torch

        size = len(self._error)
        first = int(np.random.default_rng([self._seed, step]).integers(size))
        kept = max(1, round(self.config.block_share * size))
        return torch.arange(first, first + kept, device=self._error.device).remainder_(size)
