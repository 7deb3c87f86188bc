"""Stochastic gradient descent with heavy-ball momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import OptimConfig

# linear: Goyal et al. 2017 (arXiv 1706.02677); adascale: Johnson et al. 2020 (arXiv 2007.05105).
batch_scalings = ("none", "linear", "adascale")


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["momentum", "weight_decay"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return config.momentum > 0


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    import torch

    from pipeline.optim._uncompiled import uncompiled

    # Not fused: torch 2.13 has no fused form for sharded parameters (DTensor).
    return uncompiled(torch.optim.SGD)(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )
