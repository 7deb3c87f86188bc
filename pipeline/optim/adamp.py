"""AdamP (Heo et al. 2021, arXiv 2006.08217): AdamW without what only makes scale-invariant weights longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

# √: as for AdamW, whose step it is up to a projection.
batch_scalings = ("none", "sqrt")


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["betas", "eps", "weight_decay", "delta", "decay_ratio"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return True


def check(config: Config) -> list[str]:
    ratio = config.optim.decay_ratio
    if 0 <= ratio <= 1:
        return []
    return [f"optim.decay_ratio={ratio}: must lie between 0 and 1"]


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    from pipeline.optim._adamp import AdamP

    return AdamP(model.parameters(), config)
