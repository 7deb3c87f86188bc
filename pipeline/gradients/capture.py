"""Which way to see gradients a batch estimator needs."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.gradients.microbatch import MicrobatchCapture
from pipeline.gradients.worker import WorkerCapture


class Capture(Protocol):
    """Sees the gradients of the units of one optimizer step; see the files for what a unit is."""

    def start_step(self) -> None: ...

    def unit(self, sequences: int, scale: float) -> contextlib.AbstractContextManager[None]: ...

    def sums(self) -> torch.Tensor: ...


def capture_for(estimator: str, model: nn.Module, device: torch.device) -> Capture:
    """`microbatch`, or `worker` and `paper`, which look at the same units."""
    if estimator == "microbatch":
        return MicrobatchCapture(model, device)
    assert isinstance(model, DistributedDataParallel), "one rank has no other worker to be compared with"
    return WorkerCapture(model, device)
