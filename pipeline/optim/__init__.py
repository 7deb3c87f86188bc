"""Optimizers, and the learning rate over the run. Each optimizer is one file with `build(model, config)` and
what the config check must know of it:

    settings            the settings of the optim group that it reads, besides the rate and clipping
    keeps_first_moment  whether its state holds an average of gradients, which batch.direction=momentum needs
    batch_scalings      the rules by which its learning rate may follow the batch (lr.batch_scaling)

and where it has such a thing:

    check(config)       problems of a config with it
    one_model           True: it asks for what replicas of the model cannot give
    own_rate            True: it finds its rate itself, and reads nothing of the lr group
    needs(config)       the gradient statistics that it asks for at every step
    wraps               True: it is about another optimizer, `optim.base`, whose file says the rest

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

    from pipeline.batch._interface import Needs
    from pipeline.config import Config, OptimConfig


def names() -> list[str]:
    """What `optim.name` may be."""
    return registry.names(sys.modules[__name__])


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Weight decay applies to every parameter, as in Lau et al. 2024 (Tables 5-7, "skip bias: no")."""
    optimizer: torch.optim.Optimizer = _module(config.name).build(model, config)
    return optimizer


def stepping(config: OptimConfig) -> str:
    """The name of the optimizer that steps: the one inside, where one is about another."""
    return config.base if wraps(config.name) else config.name


def wraps(name: str) -> bool:
    """Whether an optimizer is about another one, `optim.base`."""
    return getattr(_module(name), "wraps", False)


def settings(config: OptimConfig) -> frozenset[str]:
    """The settings of the group that can change anything."""
    read: frozenset[str] = _module(config.name).settings(config)
    if wraps(config.name):
        read |= {"base"} | _module(config.base).settings(config)
    return read | {"name", "lr", "clip"}


def keeps_first_moment(config: OptimConfig) -> bool:
    """Whether its state has the moment that `batch.direction=momentum` needs."""
    keeps: bool = _module(stepping(config)).keeps_first_moment(config)
    return keeps


def batch_scalings(config: OptimConfig) -> tuple[str, ...]:
    """The values of lr.batch_scaling that are derived for it."""
    scalings: tuple[str, ...] = _module(stepping(config)).batch_scalings
    return scalings


def one_model(config: OptimConfig) -> bool:
    """Whether it needs one model of all ranks."""
    return getattr(_module(config.name), "one_model", False)


def own_rate(config: OptimConfig) -> bool:
    """Whether it finds its own rate, so that the lr group has no part in it."""
    return getattr(_module(stepping(config)), "own_rate", False)


def needs(config: Config) -> Needs | None:
    """The statistics that it steps by; None: none."""
    found: Needs | None = getattr(_module(stepping(config.optim)), "needs", lambda _: None)(config)
    return found


def check(config: Config) -> list[str]:
    """Problems of the optimizer with its settings; its name, and that of the one inside, are known."""
    optim, problems = config.optim, []
    saddle = config.model.kind != "llama" and config.model.loss == "auc"
    if optim.weight_decay and "weight_decay" not in settings(optim):
        penalty = "" if saddle or config.model.kind == "llama" else ", and model.l2 for a penalty"
        problems.append(
            f"optim.weight_decay={optim.weight_decay}: optim={stepping(optim)} has no weight decay. Use "
            f"optim.weight_decay=0{penalty}"
        )
    elif optim.weight_decay and saddle:
        problems.append(
            f"optim.weight_decay={optim.weight_decay}: would also pull the saddle point's own parameters of "
            f"model.loss=auc. Use optim.weight_decay=0"
        )
    if optim.regulariser != "none" and "regulariser" not in settings(optim):
        problems.append(
            f"optim.regulariser={optim.regulariser}: optim={optim.name} has no proximal step. Use "
            f"optim=prox_sgd, or optim.regulariser=none"
        )
    for name in dict.fromkeys([optim.name, stepping(optim)]):
        if hasattr(_module(name), "check"):
            problems += _module(name).check(config)
    return problems


def _module(name: str) -> ModuleType:
    return registry.load(sys.modules[__name__], name)
