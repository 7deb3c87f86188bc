"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) with its backward pass written out.

On a CPU PyTorch has no kernel for it, and autograd goes back through each of its operations. Here the same
numbers, bit for bit, take fewer passes over memory, and the normalised input is not kept for them. (In a
model what flows back to x is added to the residual stream's gradient in one piece, not in two: that rounds
otherwise.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x [..., D] -> x·r·weight with r = 1/√(mean of x² over D + eps)."""

    def forward(self, x: Tensor) -> Tensor:
        exact = x.dtype == self.weight.dtype in (torch.float32, torch.float64)
        if exact and x.is_cpu and not torch.compiler.is_compiling():
            scaled, _ = _WrittenOut.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return scaled
        return super().forward(x)  # on a GPU, and compiled, one kernel; of bfloat16, computed in float32


class _WrittenOut(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (x * r).mul_(weight), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        """With h = gradient·weight: dx = h·r − x·r³·mean(h·x), rounded as autograd does. A second derivative
        raises: h is changed in place."""
        x, weight, r = ctx.saved_tensors
        h = gradient * weight
        mean = -0.5 * (h * x).sum(-1, keepdim=True) * r.pow(3) / x.shape[-1]
        to_weight = (x * r).mul_(gradient).sum(tuple(range(x.dim() - 1)))
        return h.mul_(r).add_(x * (2 * mean)), to_weight, None
