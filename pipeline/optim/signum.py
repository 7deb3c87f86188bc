"""Signum (Bernstein et al. 2018, arXiv 1802.04434): the sign of an average of gradients, decoupled decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import OptimConfig

# √: as Naganuma et al. 2026 (arXiv 2602.03001) scale it.
batch_scalings = ("none", "sqrt")


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["momentum", "weight_decay"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return True


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """m ← β m + (1 − β) g with β = `optim.momentum`; w ← (1 − lr λ) w − lr sign(m)."""
    from pipeline.optim._signum import Signum

    return Signum(model.parameters(), config.lr, config.momentum, config.weight_decay)
