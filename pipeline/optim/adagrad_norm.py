"""AdaGrad-Norm (Ward, Wu, Bottou 2019, arXiv 1806.01811): one rate for all, from the gradient's norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.config import OptimConfig

# No rule has a derivation: what it divides by grows with the squared norms of all gradients before.
batch_scalings = ("none",)


def settings(config: OptimConfig) -> frozenset[str]:
    return frozenset(["accumulator", "per_row", "delayed"])


def keeps_first_moment(config: OptimConfig) -> bool:
    return False


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """w ← w − lr g/√S with S = S₀ + Σ‖gᵢ‖², S₀ = `optim.accumulator`, over all steps up to this one; or, with
    `optim.delayed`, over those before it (AdaBatchGrad: Ostroukhov et al. 2024, arXiv 2402.05264, where lr is
    α and S₀ is β). The gradients are those applied, clipped.

    The default S₀ is that of AdAdaGrad's code (arXiv 2402.11215), which keeps a sum for each row of a matrix,
    an output unit's: `optim.per_row`. An element of a vector is a row here; in their code the sum of a bias
    also takes in the row of the weight that happens to come before it, which this leaves out.
    """
    from pipeline.optim._adagrad_norm import AdaGradNorm, RowAdaGradNorm

    kind = RowAdaGradNorm if config.per_row else AdaGradNorm
    return kind(model.parameters(), config.lr, config.accumulator, config.delayed)
