"""Fully sharded data parallel (FSDP2): each rank keeps a shard of every parameter, gradient and optimizer
state, and gathers one layer's parameters at a time (Zhao et al. 2023, arXiv 2304.11277)."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, ClassVar, cast

from pipeline.parallel import _strategy

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

    from pipeline.config import ParallelConfig
    from pipeline.model._interface import Model


class Strategy(_strategy.Strategy):
    axes: ClassVar[tuple[str, ...]] = ("shard",)

    @staticmethod
    def shows_workers(parallel: ParallelConfig) -> bool:
        return parallel.shard > 1  # with one shard nothing is scattered, and nothing seen

    def shard(self, model: Model) -> None:
        fully_shard_layers(model, self.mesh[self.axes], self.parallel)

    def micro_batch(
        self, model: nn.Module, *, last: bool, whole: bool
    ) -> contextlib.AbstractContextManager[object]:
        fully_sharded = cast("FSDPModule", model)
        fully_sharded.set_is_last_backward(last)
        fully_sharded.set_requires_gradient_sync(last or not whole)
        fully_sharded.set_requires_all_reduce(last)  # between replicas: once per step
        return contextlib.nullcontext()

    def release(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()  # parameters are gathered in the precision of the products


def fully_shard_layers(model: Model, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """fully_shard of each layer and of the rest, in place.

    `mesh`: [shard], or [replicate, shard] for replicas of the shards.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns of changes in place, which the model does not make.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Gradients are summed over ranks in float32: a batch test subtracts nearly equal numbers.
    policy = MixedPrecisionPolicy()
    if parallel.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        # A language model's head is needed again at once, in the backward pass.
        reshard = parallel.reshard_after_forward and layer is not getattr(model, "head", None)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)
