"""Tensor parallel inside, fully sharded across: the mesh is [replicate, shard, tensor]."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pipeline.parallel import fsdp, tp

if TYPE_CHECKING:
    from pipeline.model.llama import Llama


class Strategy(fsdp.Strategy):
    axes = ("replicate", "shard", "tensor")
    settings = fsdp.SETTINGS | {"replicate", "shard", "tensor"}

    def split(self, model: Llama) -> None:
        tp.split_matrices(model, self.mesh["tensor"])

    def shard(self, model: Llama) -> None:
        data = self.mesh["shard"] if self.parallel.replicate == 1 else self.mesh["replicate", "shard"]
        fsdp.fully_shard_layers(model, data, self.parallel)

    def loss(self) -> contextlib.AbstractContextManager[object]:
        from torch.distributed.tensor.parallel import loss_parallel

        return loss_parallel()
