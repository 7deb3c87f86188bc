"""The last gradients of a run and their mean, which stands for a noisy gradient in batch tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.gradients.norms import SquaredNorm
from pipeline.parallel._ranks import Ranks


class Recent:
    """The noise control of Bollapragada, Byrd, Nocedal 2018 (arXiv 1710.11258): where the gradient of a batch
    is mostly noise, its norm is too large and the tests are content with that batch. In a run whose batch has
    not changed for r steps the mean g_avg of the r last gradients shows it: where ‖g_avg‖ < γ‖g‖, the tests
    take g_avg for g.

    (As quoted from memory; of the paper only the abstract was at hand. γ = 0.38 is a little above 1/√10, to
    which pure noise comes with r = 10.) What the tests call a variance stays one of the step's samples
    around their mean, along g_avg and across it. Every rank has all of it: r copies of the gradient.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], steps: int, ratio: float, ranks: Ranks
    ) -> None:
        """`parameters` by their names in a checkpoint."""
        self._parameters, self._ratio, self._ranks = list(parameters.values()), ratio, ranks
        self._steps = [
            [torch.zeros_like(parameter.detach()) for parameter in self._parameters] for _ in range(steps)
        ]
        self.saved = {
            f"recent.{place}.{name}": copy
            for place, copies in enumerate(self._steps)
            for name, copy in zip(parameters, copies, strict=True)
        }
        self._norm = SquaredNorm(self._parameters, 1, ranks.device)
        self.sq_norm: float | None = None  # ‖g_avg‖² where it stands for the gradient, in the step at hand

    @torch.no_grad()
    def observe(self, step: int, unchanged: int) -> None:
        """`.grad` is the gradient of this step, and with it `unchanged` steps in a row had one batch size."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_copy_(self._steps[step % len(self._steps)], gradients)
        self.sq_norm = None
        if unchanged >= len(self._steps):
            squared, own = self._norm(self.mean()).item(), self._norm(gradients).item()
            stands = squared < self._ratio**2 * own
            self.sq_norm = self._ranks.from_main(squared if stands else None)

    @torch.no_grad()
    def mean(self) -> list[torch.Tensor]:
        """g_avg, by parameter."""
        return [torch.stack(copies).mean(0) for copies in zip(*self._steps, strict=True)]
