"""Stochastic gradient descent with steps of 1/L, L by backtracking (Bollapragada, Byrd, Nocedal 2018, arXiv
1710.11258)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._interface import Needs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

batch_scalings = ("none",)  # it finds its own rate
one_model = True  # the loss again
own_rate = True


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset()


def keeps_first_moment(config: OptimConfig) -> bool:
    return False


def needs(config: Config) -> Needs:
    """The noise of the gradient, which decides how far L may fall (`_backtracking.shrinkage`)."""
    from pipeline.batch._adaptive import check_shows_samples  # imports what imports optimizers

    return Needs("microbatch" if check_shows_samples(config) else "sample")


def check(config: Config) -> list[str]:
    clip, model, problems = config.optim.clip, config.model, []
    if clip is not None:
        problems.append(
            f"optim.clip={clip}: backtracking tests the decrease along the whole gradient. Use "
            f"optim.clip=null"
        )
    if model.kind != "llama" and model.loss == "auc":
        problems.append(
            "model.loss=auc: has a saddle point, and backtracking needs a loss to lower. Use optim=sgd"
        )
    return problems


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The first 1/L to be tried is `optim.lr`; `lr.schedule` and warmup are not read."""
    from pipeline.optim._backtracking import Backtracking

    return Backtracking(model.parameters(), config.lr)
