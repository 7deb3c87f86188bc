"""Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412), about another optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

wraps = True
one_model = True  # the gradient again, elsewhere


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["rho"])


def check(config: Config) -> list[str]:
    if config.optim.base != "backtracking":
        return []
    return [
        "optim.base=backtracking: it tests the decrease along the gradient at the weights, and optim=sam "
        "takes that at others. Use another optim.base, such as sgd"
    ]


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Twice the gradients of the optimizer inside: g at w, and the one it steps with, at w + ρ g/‖g‖, ‖g‖
    over all ranks and parameters. `train/loss`, `grad/norm` and batch tests are of the first."""
    from dataclasses import replace

    from pipeline.optim import build as build_any
    from pipeline.optim._sam import SAM

    return SAM(build_any(model, replace(config, name=config.base)), config.rho)
