"""Tensor parallel inside, fully sharded across: the mesh is [replicate, shard, tensor]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.parallel import fsdp, tp

if TYPE_CHECKING:
    from pipeline.model._interface import Model


class Strategy(fsdp.Strategy):
    axes = ("replicate", "shard", "tensor")
    split = tp.Strategy.split
    loss = tp.Strategy.loss

    def shard(self, model: Model) -> None:
        data = self.mesh["shard"] if self.parallel.replicate == 1 else self.mesh["replicate", "shard"]
        fsdp.fully_shard_layers(model, data, self.parallel)
