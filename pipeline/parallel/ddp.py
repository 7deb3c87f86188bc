"""Data parallel: every rank holds the whole model; gradients are averaged once per optimizer step, unless
the ranks are replicas that agree in another way (pipeline.sync)."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, cast

from pipeline.parallel import _strategy
from pipeline.sync import method_class

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.config import ParallelConfig
    from pipeline.model._interface import Model


class Strategy(_strategy.Strategy):
    axes: ClassVar[tuple[str, ...]] = ("replicate",)
    shows_samples = True

    @cached_property
    def _replicas(self) -> bool:
        return method_class(self.config.sync.method).replicas

    @staticmethod
    def shows_workers(parallel: ParallelConfig) -> bool:
        return parallel.replicate > 1

    def apply(self, model: Model) -> nn.Module:
        if self._replicas:
            return super().apply(model)
        from torch.nn.parallel import DistributedDataParallel

        whole = super().apply(model)
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        if self.parallel.compile:
            return DistributedDataParallel(whole, device_ids=devices, gradient_as_bucket_view=True)
        from pipeline.parallel._uncompiled import UncompiledDDP, without_compiler

        with without_compiler():
            return UncompiledDDP(whole, device_ids=devices, gradient_as_bucket_view=True)

    def micro_batch(
        self, model: nn.Module, *, last: bool, whole: bool
    ) -> contextlib.AbstractContextManager[object]:
        if last or self._replicas:
            return contextlib.nullcontext()
        return cast("DistributedDataParallel", model).no_sync()
