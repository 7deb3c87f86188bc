"""torch's DistributedDataParallel without its compiler (torch._dynamo), which it would import for one setting
and one wrapper. That takes a second and more before a run's first step. For a model that is not compiled."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


class UncompiledDDP(DistributedDataParallel):
    # Around the forward pass. The wrapper keeps the compiler out of it.
    _inside_ddp_forward = contextlib.contextmanager(
        inspect.unwrap(DistributedDataParallel._inside_ddp_forward)
    )


class _Compiler:
    """In the place of torch._dynamo. Whatever else is asked of it, the true one answers."""

    # Which buckets a compiled model would have: DDP asks in its constructor, for "python_reducer" alone.
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "no_optimization")

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch._dynamo"), name)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """While UncompiledDDP is constructed. Does nothing where the compiler has been imported already."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    stand_in = torch.__dict__["_dynamo"] = _Compiler()
    try:
        yield
    finally:
        if torch.__dict__.get("_dynamo") is stand_in:  # else the true one has been imported meanwhile
            del torch.__dict__["_dynamo"]
