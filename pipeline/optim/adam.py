"""Adam (Kingma and Ba 2015, arXiv 1412.6980), fused. Weight decay is a part of the gradient; see adamw."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import OptimConfig

# √: Malladi et al. 2022 (arXiv 2205.10287), while the gradient is mostly noise. No other has a derivation.
batch_scalings = ("none", "sqrt")


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["betas", "eps", "weight_decay"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return True


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    import torch

    from pipeline.optim._uncompiled import uncompiled

    beta1, beta2 = config.betas
    return uncompiled(torch.optim.Adam)(
        model.parameters(),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
