"""A2SGD: two-level gradient averaging (Bhattacharya, Yu and Chowdhury 2020, arXiv 2006.07405).

Of its gradient g a replica tells the others two numbers in every step, 64 bits: μ₊, the mean of the
entries that are not negative, and μ₋, the mean size of the others. Their means over the replicas take the
place of the own ones,

    g' = (g − enc(g; μ₊, μ₋)) + enc(g; μ̄₊, μ̄₋),    enc(g; a, b) = a where g ≥ 0, −b elsewhere,

while the residual g − enc(g) stays where it arose. So replicas drift apart for as long as they train: nothing
ever averages their models. What is evaluated and exported is the mean of them. Clipping is of g'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    import torch


class Method(_interface.Method):
    def before_step(self, step: int, rate: float) -> None:
        gradient = self.replica.gradient()
        own = levels(gradient)
        self.replica.set_gradient(shifted(gradient, self.replica.averaged(own.clone()) - own))


def levels(gradient: torch.Tensor) -> torch.Tensor:
    """[μ₊, μ₋] of a gradient [n]; 0 where there is no such entry."""
    import torch

    negative = (gradient < 0).sum()
    counts = torch.stack([gradient.numel() - negative, negative])
    sums = torch.stack([gradient.clamp(min=0).sum(), -gradient.clamp(max=0).sum()])
    return sums / counts.clamp(min=1)


def shifted(gradient: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """In place, with both levels [2] moved by `shift`, away from 0."""
    import torch

    return gradient.add_(torch.where(gradient < 0, -shift[1], shift[0]))
