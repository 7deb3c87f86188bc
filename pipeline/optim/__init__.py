"""Optimizers, and the learning rate over the run. Each optimizer is one file with `build(parameters, config)`
and what the config check must know of it:

    keeps_first_moment  whether its state holds an average of gradients, which batch.direction=momentum needs
    batch_scalings      the rules by which its learning rate may follow the batch (lr.batch_scaling)

Importing this package, or an optimizer, does not import torch: the command line checks configs with it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline import registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import OptimConfig


def names() -> list[str]:
    """What `optim.name` may be."""
    return registry.names(sys.modules[__name__])


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Weight decay applies to every parameter, as in Lau et al. 2024 (Tables 5-7, "skip bias: no")."""
    optimizer: torch.optim.Optimizer = _module(config.name).build(list(model.parameters()), config)
    return optimizer


def keeps_first_moment(config: OptimConfig) -> bool:
    keeps: bool = _module(config.name).keeps_first_moment(config)
    return keeps


def batch_scalings(name: str) -> tuple[str, ...]:
    scalings: tuple[str, ...] = _module(name).batch_scalings
    return scalings


def _module(name: str) -> ModuleType:
    return registry.load(sys.modules[__name__], name)
