"""CoDA: stagewise proximal primal-dual steps to the saddle point of the AUC loss (Guo et al. 2020, arXiv
2005.02426), with replicas that meet every `sync.period` steps under sync=local_sgd."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import Config, OptimConfig

batch_scalings = ("none",)  # no rule has a derivation; the stages set its rate


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["stage_tokens", "stage_growth", "proximity"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return False


def check(config: Config) -> list[str]:
    model, optim, parallel, problems = config.model, config.optim, config.parallel, []
    if model.kind == "llama" or model.loss != "auc":
        loss = "" if model.kind == "llama" else f" model.loss={model.loss}"
        problems.append(
            f"optim=coda model={model.name}{loss}: it looks for the saddle point of the AUC loss. Use "
            f"model.loss=auc with a model of labelled samples, or optim=sgd"
        )
    if optim.lr > optim.proximity:
        problems.append(
            f"optim.lr={optim.lr}: above optim.proximity={optim.proximity}, a step would lead beyond the "
            f"point that it is drawn to. Nearest optim.lr: {optim.proximity}"
        )
    if config.sync.method not in ("allreduce", "local_sgd"):
        problems.append(
            f"optim=coda sync={config.sync.method}: a stage ends with the mean over all replicas. Use "
            f"sync=local_sgd or sync=allreduce"
        )
    if parallel.shard * parallel.tensor > 1:
        problems.append(
            f"optim=coda parallel={parallel.strategy}: needs a, b and α of the loss on a rank. Use "
            f"parallel=single or parallel=ddp"
        )
    if optim.name != "coda":
        problems.append(
            f"optim.base=coda: has stages and means of its own. Use optim=coda, or another optim.base with "
            f"optim={optim.name}"
        )
    return problems


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """With v all weights, a and b, and with g the gradient of F, clipped, which is reversed for α:

        v ← v − η (g + (v − v̂)/γ),   α ← α − η g,   η = lr/growth^s,   γ = `optim.proximity`

    in stage s = 0, 1, …, which lasts `optim.stage_tokens` × growth^s tokens with growth `optim.stage_growth`.
    A stage ends with the mean of its iterates, over steps and replicas, in place of v and α: the next one
    begins there, and that v is its v̂. In the first, v̂ is what the run begins with.

    The mean, not the last iterate: the paper's bound on a stage, whose problem F + ‖v − v̂‖²/2γ is strongly
    convex and concave for a small γ, is one of the mean. As replicas meet for it, v̂ is the same on all, so
    that stages may end anywhere between two of their meetings.

    Step, stages and rates are those of the authors' code (github.com/ZhishuaiGuo/DistributedAUC, eb314ab:
    growth 3, γ 2000, lr 0.1), for a constant period, as there. Different here: a replica's mean there is its
    own until the next meeting, also holds the iterate it begins with, and leaves out a and b, which begin a
    stage where the last one began; b is drawn to a − â. None of that is in the method. α there begins a
    stage at what it should be, the mean score of the negatives minus that of the positives, of samples drawn
    for it; its mean, here, takes none.
    """
    from pipeline.optim._coda import CoDA

    return CoDA(model, config)
