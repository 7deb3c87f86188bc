"""AdamP as a torch optimizer; apart from adamp.py, which must not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.config import OptimConfig
from pipeline.gradients.dtensor import row_sums, whole
from pipeline.optim._uncompiled import Uncompiled


class AdamP(Uncompiled):
    """u = (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε); w ← (1 − lr λ r) w − lr u.

    A weight of several dimensions whose gradient is nearly orthogonal to it, as that of a weight before a
    norm is, has the part of u along it taken out, u ← u − ŵ⟨ŵ, u⟩, and r = `decay_ratio`; else r = 1. Looked
    at by output unit first: the largest |cos(g, w)| of all must be below δ/√n, with n elements each. Then as
    a whole. In the form of the authors' code: ŵ = w/(‖w‖ + ε).
    """

    def __init__(self, parameters: Iterable[Tensor], config: OptimConfig) -> None:
        settings = ("lr", "betas", "eps", "weight_decay", "delta", "decay_ratio")
        super().__init__(parameters, {name: getattr(config, name) for name in settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[weight], weight.grad
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                count = state["step"].item()
                root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
                update = state["exp_avg"] / root / (1 - beta1**count)
                decay = group["lr"] * group["weight_decay"]
                if weight.dim() > 1:
                    along = _along(weight, gradient, update, group["delta"], group["eps"])
                    if along is not None:
                        update -= along
                        decay *= group["decay_ratio"]
                weight.mul_(1 - decay).sub_(update, alpha=group["lr"])


def _along(weight: Tensor, gradient: Tensor, update: Tensor, delta: float, eps: float) -> Tensor | None:
    """The part of the update along the weight, ŵ⟨ŵ, u⟩, if it is to be taken out."""
    of_gradient, of_update, gradient_squares, weight_squares = (
        row_sums(left * right)
        for left, right in ((gradient, weight), (update, weight), (gradient, gradient), (weight, weight))
    )
    products, squares, weights = whole(of_gradient), whole(gradient_squares), whole(weight_squares)
    if _largest_cosine(products, squares, weights, eps) < delta / math.sqrt(weight[0].numel()):
        return weight * (of_update / (weight_squares.sqrt() + eps) ** 2)
    square = weights.sum()
    if _largest_cosine(products.sum(), squares.sum(), square, eps) < delta / math.sqrt(weight.numel()):
        norm = math.sqrt(square.item()) + eps
        return weight * (whole(of_update).sum().item() / norm**2)
    return None


def _largest_cosine(products: Tensor, squares: Tensor, others: Tensor, eps: float) -> float:
    return float((products.abs() / (squares.sqrt().clamp_min(eps) * others.sqrt().clamp_min(eps))).max())
