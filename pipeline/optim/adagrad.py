"""AdaGrad (Duchi, Hazan, Singer 2011), coordinate by coordinate, as AdAdaGrad uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import OptimConfig

# √: as for other methods that divide by a root of squared gradients (Malladi et al. 2022, arXiv 2205.10287).
batch_scalings = ("none", "sqrt")


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["eps", "weight_decay"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return False


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    import torch

    from pipeline.optim._uncompiled import uncompiled

    return uncompiled(torch.optim.Adagrad)(
        model.parameters(), lr=config.lr, eps=config.eps, weight_decay=config.weight_decay, foreach=True
    )
