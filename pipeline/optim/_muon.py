"""Which parameters Muon steps; apart from muon.py, which must not import torch."""

from __future__ import annotations

from torch import Tensor, nn


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of two dimensions but for embeddings and the output layer, the last linear one: what they take
    or give is not a vector whose length a spectral norm measures (Jordan et al. 2024)."""
    modules = list(model.modules())
    output = [module for module in modules if isinstance(module, nn.Linear)][-1:]
    apart = [*output, *(module for module in modules if isinstance(module, nn.Embedding))]
    left_out = {id(module.weight) for module in apart}
    return [p for p in model.parameters() if p.dim() == 2 and id(p) not in left_out]
