"""Data parallel: every rank holds the whole model; gradients are averaged once per optimizer step."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.config import ParallelConfig
    from pipeline.parallel._ranks import Ranks

AXES = ("replicate",)


def apply(model: nn.Module, ranks: Ranks, parallel: ParallelConfig) -> nn.Module:
    if ranks.world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def without_sync(model: DistributedDataParallel) -> contextlib.AbstractContextManager[None]:
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()
