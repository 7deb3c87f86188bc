"""This rank's own model, seen as one vector, among those of the other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from pipeline.parallel._ranks import Ranks


class Replica:
    """Weights and gradient of a model as vectors [n], in the order of its parameters."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self._names = [name for name, _ in model.named_parameters()]
        self._sizes = [parameter.numel() for parameter in self.parameters]

    @torch.no_grad()
    def weights(self) -> torch.Tensor:
        """A copy."""
        return torch.cat([parameter.view(-1) for parameter in self.parameters])

    @torch.no_grad()
    def set_weights(self, weights: torch.Tensor) -> None:
        torch._foreach_copy_(self.parameters, self._parts(weights))

    @torch.no_grad()
    def gradient(self) -> torch.Tensor:
        """A copy."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        return torch.cat([gradient.view(-1) for gradient in gradients])

    def set_gradient(self, gradient: torch.Tensor) -> None:
        """Keeps the vector: `.grad` of every parameter is a part of it."""
        for parameter, part in zip(self.parameters, self._parts(gradient), strict=True):
            parameter.grad = part

    def averaged(self, vector: torch.Tensor) -> torch.Tensor:
        """In place, over all ranks, which wait for each other. Bit for bit the same on all."""
        dist.all_reduce(vector)
        return vector.div_(self.ranks.world_size)

    @contextlib.contextmanager
    def replaced_by_mean(self) -> Iterator[None]:
        """While the block runs the model is the mean over the ranks, which all enter it."""
        own = self.weights()
        self.set_weights(self.averaged(own.clone()))
        try:
            yield
        finally:
            self.set_weights(own)

    def by_name(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._names, self._parts(weights), strict=True))

    def _parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        parts = vector.split(self._sizes)
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
