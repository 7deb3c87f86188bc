"""Units = micro-batches: a hook on each autograd leaf sees one rank's gradient of one micro-batch.

It runs before the gradient is accumulated, averaged over ranks or divided, on every strategy whose leaves
are whole parameters. Cost: one read of each gradient, and one float32 number per matrix row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pipeline.gradients.norms import SquaredNorm, write_row_norms


class MicrobatchCapture:
    """Sums Σ n_j‖g_j‖² and Σ‖g_j‖² over the micro-batches of this rank in one optimizer step."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        leaves = [p for p in model.parameters() if p.requires_grad]
        self._norm = SquaredNorm([p.shape for p in leaves], device)
        self._seen = [False] * len(leaves)
        self._active = False
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        for index, leaf in enumerate(leaves):
            leaf.register_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        slot = self._norm.rows[index]

        def see(gradient: torch.Tensor) -> None:
            if self._active:
                # Two gradients of one leaf in one backward pass would each be a part of it.
                assert not self._seen[index], "a parameter received two partial gradients"
                self._seen[index] = True
                write_row_norms(gradient.detach(), slot)

        return see

    def start_step(self) -> None:
        self._sums.zero_()

    @contextlib.contextmanager
    def unit(self, sequences: int, scale: float) -> Iterator[None]:
        """Around the backward pass of `scale` × (mean loss of a micro-batch of `sequences`)."""
        if sequences == 0:  # this rank has no share in the last micro-batches of the run
            yield
            return
        self._active = True
        try:
            yield
        finally:
            self._active = False
        assert all(self._seen), "a parameter received no gradient"
        self._seen = [False] * len(self._seen)
        squared = self._norm.total() / scale**2
        self._sums += torch.stack([sequences * squared, squared, torch.ones_like(squared)])

    def sums(self) -> torch.Tensor:
        """[Σ n_j‖g_j‖², Σ‖g_j‖², units] of this rank, float64; to be summed over ranks."""
        return self._sums
