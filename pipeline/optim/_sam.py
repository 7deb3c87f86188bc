"""SAM as a torch optimizer; apart from sam.py, which must not import torch."""

from __future__ import annotations

import math

import torch

from pipeline.optim._composite import Composite
from pipeline.optim._evaluation import Evaluation


class SAM(Composite):
    def __init__(self, inside: torch.optim.Optimizer, rho: float) -> None:
        super().__init__([inside])
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Evaluation | None = None) -> None:
        if closure:
            weights = self.weights()
            before = [weight.clone() for weight in weights]
            distance = self.rho / (math.sqrt(closure.squared_norm) + 1e-12)
            torch._foreach_add_(weights, self.gradients(), alpha=distance)
            closure.squared_norm = closure.gradient_again()
            torch._foreach_copy_(weights, before)
        super().step(closure)
