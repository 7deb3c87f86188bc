"""One process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from pipeline.config import ParallelConfig
    from pipeline.parallel._ranks import Ranks

AXES: tuple[str, ...] = ()


def apply(model: nn.Module, ranks: Ranks, parallel: ParallelConfig) -> nn.Module:
    return model


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
