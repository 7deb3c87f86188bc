"""Proximal stochastic gradient: F + h with a convex h that has no gradient, such as ‖w‖₁ or a constraint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

# linear: as for SGD, Goyal et al. 2017 (arXiv 1706.02677).
batch_scalings = ("none", "linear")

_READ = {"l1": ["l1"], "l2": ["l2"], "elastic_net": ["l1", "l2"], "box": ["lower", "upper"], "simplex": []}


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["regulariser", *_READ.get(config.regulariser, [])])


def keeps_first_moment(config: OptimConfig) -> bool:
    return False


def check(config: Config) -> list[str]:
    optim, model, problems = config.optim, config.model, []
    if optim.regulariser == "none":
        problems.append("optim.regulariser=none: optim=prox_sgd needs one. Use optim=sgd optim.momentum=0")
    for key in ("l1", "l2"):
        if key in settings(optim) and getattr(optim, key) < 0:
            problems.append(f"optim.{key}={getattr(optim, key)}: must not be negative")
    if optim.regulariser == "box":
        if optim.lower is None and optim.upper is None:
            problems.append("optim.lower=null optim.upper=null: a box needs at least one bound")
        elif optim.lower is not None and optim.upper is not None and optim.lower >= optim.upper:
            problems.append(f"optim.lower={optim.lower}: must be below optim.upper={optim.upper}")
    if optim.regulariser == "simplex":
        if model.kind != "logistic" or model.loss == "cross_entropy":
            problems.append(
                f"optim.regulariser=simplex model={model.name}: a probability simplex is of one vector of "
                f"weights, and this model has matrices. Use model=logistic model.loss=binary, or another "
                f"optim.regulariser"
            )
        if config.parallel.shard * config.parallel.tensor > 1:
            problems.append(
                f"optim.regulariser=simplex parallel={config.parallel.strategy}: projecting on a simplex "
                f"needs the whole vector on a rank. Use parallel=single or parallel=ddp"
            )
    return problems


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """w ← argmin_u h(u) + ‖u − (w − lr g)‖²/(2 lr) for weights; biases and norms, which have one dimension,
    are not regularised and take the plain step: a penalty or a bound on them would move the decision, not
    simplify it. `train/loss` is F without h."""
    from pipeline.optim._prox_sgd import ProxSGD
    from pipeline.optim._proximal import proximal

    return ProxSGD(model.parameters(), config.lr, proximal(config))
