"""Proximal operators, argmin_u h(u) + ‖u − v‖²/(2α), as pure functions of v and α (Parikh and Boyd 2014,
Proximal Algorithms, section 6). A constraint is an h that is infinite outside of it; its operator is the
projection, whatever α is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config import OptimConfig

Proximal = Callable[[Tensor, float], Tensor]


def elastic_net(l1: float, l2: float) -> Proximal:
    """h(u) = l1 ‖u‖₁ + l2/2 ‖u‖²: shrinks by α l1 towards 0, then by the factor 1/(1 + α l2)."""

    def operator(v: Tensor, rate: float) -> Tensor:
        return v.sign() * (v.abs() - rate * l1).clamp_min(0) / (1 + rate * l2)

    return operator


def box(lower: float | None, upper: float | None) -> Proximal:
    """lower ≤ u ≤ upper, elementwise; None: no bound."""
    return lambda v, rate: v.clamp(lower, upper)


def simplex(v: Tensor, rate: float) -> Tensor:
    """u ≥ 0, Σ u = 1: u = max(v − τ, 0), where τ makes the sum 1 (Held, Wolfe, Crowder 1974). Above τ are the
    k largest elements, with the largest k for which the k-th of them is above τ_k = (their sum − 1)/k."""
    descending = v.flatten().sort(descending=True).values.double()
    counts = torch.arange(1, v.numel() + 1, device=v.device)
    thresholds = (descending.cumsum(0) - 1) / counts
    positive = int((descending > thresholds).sum())
    return (v - thresholds[positive - 1].to(v.dtype)).clamp_min(0)


def penalty(config: OptimConfig) -> Callable[[Tensor], Tensor]:
    """h of `optim.regulariser`, where that is finite: 0 within a constraint."""
    l1 = config.l1 if config.regulariser in ("l1", "elastic_net") else 0.0
    l2 = config.l2 if config.regulariser in ("l2", "elastic_net") else 0.0
    return lambda u: l1 * u.abs().sum() + l2 / 2 * u.square().sum()


def proximal(config: OptimConfig) -> Proximal:
    """The operator of `optim.regulariser`, which must not be none."""
    return {
        "l1": elastic_net(config.l1, 0.0),
        "l2": elastic_net(0.0, config.l2),
        "elastic_net": elastic_net(config.l1, config.l2),
        "box": box(config.lower, config.upper),
        "simplex": simplex,
    }[config.regulariser]
