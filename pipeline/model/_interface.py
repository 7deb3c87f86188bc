"""What every model is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.config import ParallelConfig


class Model(nn.Module):
    """Its parameters are unset until pipeline.model.init.initialise; it has no buffers."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Parts whose parameters are gathered apart from each other when they are sharded, in the order of
        the forward pass."""
        return ()

    def tie(self) -> None:
        """Lets parameters be shared: again after whatever replaces them (to_empty, tensor parallelism)."""

    def prepare(self, parallel: ParallelConfig) -> None:
        """Activation checkpointing and compilation, in place; parameter names stay as they are. Its place is
        after tensor parallelism and before FSDP or DDP."""
        if parallel.compile:
            self.compile()

    def initial_weight(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The whole float32 tensor of the parameter `name`, on the CPU."""
        raise NotImplementedError
