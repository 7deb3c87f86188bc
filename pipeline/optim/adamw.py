"""AdamW (Loshchilov and Hutter 2019), fused."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import OptimConfig


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Weight decay applies to every parameter, as in Lau et al. 2024 (Tables 5-7, "skip bias: no")."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
