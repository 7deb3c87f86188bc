"""Muon (Jordan et al. 2024; torch's own) for matrices between embedding and output, AdamW for all else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

# √: as Naganuma et al. 2026 (arXiv 2602.03001) scale it.
batch_scalings = ("none", "sqrt")


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["momentum", "betas", "eps", "weight_decay"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return True


def check(config: Config) -> list[str]:
    model = config.model
    if model.kind == "llama" or (model.kind == "mlp" and model.widths):
        return []
    return [
        f"optim=muon model={model.name}: it has no matrix between input and output for Muon to step. Use "
        f"optim=adamw, or model=mlp with at least one of model.widths"
    ]


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Steps of matrices are scaled by 0.2 √(longer side), so that they are as long as AdamW's and one
    learning rate and weight decay serve both (Liu et al. 2025, arXiv 2502.16982)."""
    import torch

    from pipeline.optim._composite import Composite
    from pipeline.optim._muon import hidden_matrices
    from pipeline.optim._uncompiled import uncompiled

    hidden = hidden_matrices(model)
    named = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in model.parameters() if id(parameter) not in named]
    beta1, beta2 = config.betas
    muon = uncompiled(torch.optim.Muon)(
        hidden,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = uncompiled(torch.optim.AdamW)(
        others,
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return Composite([muon, adamw])
