"""Averages of iterates (stochastic weight averaging: Izmailov et al. 2018, arXiv 1803.05407), about another
optimizer, which goes on as if there were none: the mean is evaluated beside the last iterate, as
`val/loss_averaged`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

wraps = True
one_model = True  # its average


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["average_start", "average_interval_tokens", "average_restart_tokens"])


def check(config: Config) -> list[str]:
    optim, problems = config.optim, []
    if not 0 <= optim.average_start < 1:
        problems.append(f"optim.average_start={optim.average_start}: must be at least 0 and below 1")
    restart, interval = optim.average_restart_tokens, optim.average_interval_tokens
    left = config.planned_tokens - round(optim.average_start * config.planned_tokens)
    if interval is not None and 0 < left < interval:
        problems.append(
            f"optim.average_interval_tokens={interval}: longer than what is left of the budget from "
            f"optim.average_start={optim.average_start} on, so that there is no mean. Nearest: {left}"
        )
    if restart is not None and interval is not None and restart < interval:
        problems.append(
            f"optim.average_restart_tokens={restart}: shorter than optim.average_interval_tokens={interval}, "
            f"so that some means would be of nothing. Nearest: {interval}"
        )
    return problems


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer inside; the trainer has the average (`pipeline.optim._average`)."""
    from dataclasses import replace

    from pipeline.optim import build as build_any

    return build_any(model, replace(config, name=config.base))
