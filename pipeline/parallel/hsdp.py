"""Hybrid sharding: replicas of a model that is fully sharded within each. `parallel.shard` ranks hold one
replica; gradients are scattered among them at every micro-batch and averaged over replicas once a step."""

from __future__ import annotations

from pipeline.parallel import fsdp


class Strategy(fsdp.Strategy):
    axes = ("replicate", "shard")
