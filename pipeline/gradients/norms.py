"""Squared norms and inner products that can be subtracted from each other.

tr Σ is a difference of nearly equal sums, and float32 norms of large flat tensors are off by up to 1e-2 on
a CPU (65M elements). Norms of rows in float32, squared and summed in float64, are off by 1e-8 at the same
speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pipeline.gradients.dtensor import local, shares

FLAT_ROW = 4096  # a vector longer than this is cut into rows
PRODUCT_ROW = 2**18  # elements of one inner product in float32


def row_count(shape: Sequence[int]) -> int:
    """Rows that `write_row_norms` fills for a tensor of this shape."""
    if len(shape) > 1:
        return math.prod(shape[:-1])
    return math.ceil(shape[0] / FLAT_ROW) if shape else 1


def write_row_norms(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """The float32 norm of each row of `tensor` [..., n] into `out` [row_count]."""
    if tensor.dim() > 1:
        rows = tensor.reshape(-1, tensor.shape[-1])
        torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32, out=out)
        return
    flat = tensor.reshape(-1)
    whole = flat.numel() // FLAT_ROW
    if whole:
        rows = flat[: whole * FLAT_ROW].view(whole, FLAT_ROW)
        torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32, out=out[:whole])
    if rest := flat.numel() - whole * FLAT_ROW:
        torch.linalg.vector_norm(flat[-rest:], dtype=torch.float32, out=out[whole])


class SquaredNorm:
    """‖·‖² of tensors like the given ones, with the memory for their row norms kept between calls.

    Of tensors spread over `ranks` ranks each rank gives its part, and the sum over ranks is ‖·‖².
    """

    def __init__(self, like: Sequence[torch.Tensor], ranks: int, device: torch.device) -> None:
        counts = [row_count(local(tensor).shape) for tensor in like]
        self._norms = torch.zeros(sum(counts), device=device)
        self.rows = list(self._norms.split(counts))  # the slot of each tensor
        by_tensor = torch.tensor(shares(like, ranks), dtype=torch.float64)
        self._shares = by_tensor.repeat_interleave(torch.tensor(counts)).to(device)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of this rank's parts: float64 scalar on the device."""
        for tensor, rows in zip(tensors, self.rows, strict=True):
            write_row_norms(tensor, rows)
        return self.total()

    def total(self) -> torch.Tensor:
        """The sum of squares of what lies in the slots, by their shares."""
        return self._norms.double().square_() @ self._shares


def inner_products(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """⟨row, vector⟩ of rows [J, n], float64 [J]: float32 products of parts, summed in float64."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], PRODUCT_ROW):
        part = slice(start, start + PRODUCT_ROW)
        total += rows[:, part].float() @ vector[part].float()
    return total
