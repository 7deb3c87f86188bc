"""What every parallel strategy is, with the behaviour of one process as the default of each part."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.config import Config, ParallelConfig
    from pipeline.model._interface import Model
    from pipeline.parallel._ranks import Ranks


class Strategy:
    """One way to spread a model over ranks. A subclass overrides what differs from one process."""

    axes: ClassVar[tuple[str, ...]] = ()  # of the mesh: replicate, shard, tensor
    shows_samples: ClassVar[bool] = False  # whether every rank has all parameters and gradients whole

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.parallel, self.ranks = config, config.parallel, ranks

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks, [replicate, shard, tensor]: neighbouring ranks share matrices, then parameters."""
        from torch.distributed.device_mesh import init_device_mesh

        sizes = self.parallel.mesh
        return init_device_mesh(self.ranks.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    @staticmethod
    def shows_workers(parallel: ParallelConfig) -> bool:
        """Whether the gradient of each data-parallel rank can be seen before they are averaged."""
        return False

    def apply(self, model: Model) -> nn.Module:
        """The model, given on the meta device, spread over the ranks and with its initial weights."""
        from pipeline.model.init import initialise

        self.split(model)
        model.prepare(self.parallel)
        self.shard(model)
        initialise(model, self.config.seed, self.ranks.device)
        return model

    def split(self, model: Model) -> None:
        """Distributes matrix products, in place."""

    def shard(self, model: Model) -> None:
        """Distributes the storage of parameters, in place."""

    def micro_batch(
        self, model: nn.Module, *, last: bool, whole: bool
    ) -> contextlib.AbstractContextManager[object]:
        """Around both passes of one micro-batch.

        `last` of its step: averages gradients over ranks. `whole`: until then each rank keeps its own
        gradient unreduced, even where it could keep a shard.
        """
        return contextlib.nullcontext()

    def loss(self) -> contextlib.AbstractContextManager[object]:
        """Around the loss and, in training, its backward pass."""
        return contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Around the forward pass: the precision of its matrix products."""
        if self.parallel.precision == "float32":
            return contextlib.nullcontext()
        import torch

        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def release(self, model: nn.Module) -> None:
        """After forward passes that no backward pass follows: frees what was gathered for one, lest the next
        forward pass takes it for the weights, which may be others then."""

    def complete_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """After the last backward pass of a step: whatever is still missing in `.grad`."""
