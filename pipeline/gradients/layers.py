"""Gradients of single samples in one layer, from its inputs a_i and the gradients δ_i of its outputs.

What a test needs of them are sums over samples, and those need no gradient of the model for each sample. A
linear layer's is the outer product δ_i a_iᵀ, and ‖δ_i a_iᵀ‖² = ‖δ_i‖²‖a_i‖² (Goodfellow 2015, arXiv
1510.01799). A convolution's is D_i U_iᵀ, with U_i the patches of the input [inputs of an output, positions]
and D_i the gradient of the output [outputs, positions]; its squared norm is also Σ (U_iᵀU_i) ∘ (D_iᵀD_i) over
pairs of positions, which is cheaper where an image has few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ELEMENTS = 2**21  # of what a convolution unfolds at a time


class Layer(Protocol):
    """`inputs` [n, …] and `deltas` [n, …] are those of n samples."""

    def sum_sq_norm(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        """Σ_i ‖∇_i‖² over all parameters: float32 norms, a float64 scalar."""
        ...

    def sum_squares(self, inputs: Tensor, deltas: Tensor) -> list[Tensor]:
        """Σ_i ∇_i² of every coordinate, of each parameter."""
        ...


def layers_of(model: nn.Module) -> dict[nn.Module, Layer]:
    """All parts of the model that hold parameters."""
    found: dict[nn.Module, Layer] = {}
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Linear):
            found[module] = _Linear(module)
        elif isinstance(module, nn.Conv2d):
            found[module] = _Convolution(module)
        elif isinstance(module, nn.GroupNorm):
            found[module] = _GroupNorm(module)
        else:
            raise TypeError(f"{name}: no way to tell the samples' gradients of a {type(module).__name__}")
    return found


def _squared(norms: Tensor) -> Tensor:
    return norms.double().square_()


class _Linear:
    """inputs [n, in] -> [n, out]"""

    def __init__(self, module: nn.Linear) -> None:
        self._bias = module.bias is not None

    def sum_sq_norm(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        factors = _squared(torch.linalg.vector_norm(inputs, dim=1)) + self._bias
        return factors @ _squared(torch.linalg.vector_norm(deltas, dim=1))

    def sum_squares(self, inputs: Tensor, deltas: Tensor) -> list[Tensor]:
        squares = deltas.square()
        return [squares.T @ inputs.square(), *([squares.sum(0)] if self._bias else [])]


class _Convolution:
    """inputs [n, channels, height, width] -> [n, out, height', width']"""

    def __init__(self, module: nn.Conv2d) -> None:
        # Patches of groups, or with other padding than zeros, are not those of unfold.
        assert module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        self._module, self._bias = module, module.bias is not None

    def sum_sq_norm(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        outputs, fan_in, positions = self._sizes(deltas)
        by_position = positions * (outputs + fan_in) < outputs * fan_in  # fewer multiplications
        total = torch.zeros((), dtype=torch.float64, device=deltas.device)
        for patches, d in self._parts(inputs, deltas):
            if by_position:
                total += (patches.mT @ patches).mul_(d.mT @ d).sum(2).sum(dtype=torch.float64)
            else:
                total += _squared(torch.linalg.vector_norm(d @ patches.mT, dim=2)).sum()
            if self._bias:
                total += _squared(d.sum(2)).sum()
        return total

    def sum_squares(self, inputs: Tensor, deltas: Tensor) -> list[Tensor]:
        weight = torch.zeros_like(self._module.weight).flatten(1)
        bias = weight.new_zeros(len(weight))
        for patches, d in self._parts(inputs, deltas):
            weight += (d @ patches.mT).square_().sum(0)
            bias += d.sum(2).square_().sum(0)
        return [weight.view_as(self._module.weight), *([bias] if self._bias else [])]

    def _sizes(self, deltas: Tensor) -> tuple[int, int, int]:
        """(outputs, inputs of an output, positions)"""
        return deltas.shape[1], self._module.weight[0].numel(), deltas.shape[2] * deltas.shape[3]

    def _parts(self, inputs: Tensor, deltas: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(U [m, inputs of an output, positions], D [m, outputs, positions]) of a few samples at a time."""
        module = self._module
        outputs, fan_in, positions = self._sizes(deltas)
        count = max(1, ELEMENTS // max(fan_in * positions, outputs * fan_in))
        for some, d in zip(inputs.split(count), deltas.flatten(2).split(count), strict=True):
            patches = F.unfold(some, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
            yield patches, d


class _GroupNorm:
    """inputs [n, channels, …], scaled and shifted channel by channel"""

    def __init__(self, module: nn.GroupNorm) -> None:
        assert module.affine
        self._module = module

    def sum_sq_norm(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        return torch.stack([_squared(g).sum() for g in self._gradients(inputs, deltas)]).sum()

    def sum_squares(self, inputs: Tensor, deltas: Tensor) -> list[Tensor]:
        return [gradient.square().sum(0) for gradient in self._gradients(inputs, deltas)]

    def _gradients(self, inputs: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Of weight and bias, [n, channels] each."""
        normalised = F.group_norm(inputs, self._module.num_groups, eps=self._module.eps)
        return (deltas * normalised).flatten(2).sum(2), deltas.flatten(2).sum(2)
