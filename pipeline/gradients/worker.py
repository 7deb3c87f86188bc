"""Units = data-parallel ranks: DDP's communication hook sees each rank's accumulated gradient.

The hook is called with flat buckets of the local gradients, summed over micro-batches and not yet divided
by the number of ranks; the hook then averages them as DDP would. (DDP checks the hook's annotations, so
they must not be strings: no `from __future__ import annotations` here.)
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.gradients.norms import SquaredNorm


class WorkerCapture:
    """Sums n_j‖g_j‖² and ‖g_j‖² of this rank's accumulated gradient in one optimizer step."""

    def __init__(self, model: DistributedDataParallel, device: torch.device) -> None:
        self._device = device
        self._squared = torch.zeros((), dtype=torch.float64, device=device)
        self._active = False
        self._sequences = 0
        self._scale = 0.0
        model.register_comm_hook(dist.group.WORLD, self._reduce)

    def _reduce(
        self,
        group: dist.ProcessGroup,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        if self._active:
            flat = bucket.buffer()
            self._squared += SquaredNorm([flat.shape], self._device)([flat])
        return allreduce_hook(group, bucket)

    def start_step(self) -> None:
        self._squared.zero_()
        self._active = True
        self._sequences = 0
        self._scale = 0.0

    def unit(self, sequences: int, scale: float) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of `scale` × (mean loss of a micro-batch of `sequences`)."""
        self._sequences += sequences
        self._scale += scale
        return contextlib.nullcontext()

    def sums(self) -> torch.Tensor:
        """[n_j‖g_j‖², ‖g_j‖², 1] of this rank, float64; to be summed over ranks."""
        self._active = False
        if self._sequences == 0:
            return torch.zeros(3, dtype=torch.float64, device=self._device)
        squared = self._squared / self._scale**2
        return torch.stack([self._sequences * squared, squared, torch.ones_like(squared)])
