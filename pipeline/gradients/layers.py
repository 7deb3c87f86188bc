"""Gradients of single samples in one layer, from its inputs a_i and the gradients δ_i of its outputs.

What a test needs of them are sums over samples, and those need no gradient of the model for each sample. A
linear layer's is the outer product δ_i a_iᵀ, and ‖δ_i a_iᵀ‖² = ‖δ_i‖²‖a_i‖² (Goodfellow 2015, arXiv
1510.01799). A convolution's is D_i U_iᵀ, with D_i the gradient of the output [outputs, positions] and U_i the
inputs that each element of the kernel meets at each position [kernel × channels, positions]; its squared norm
is also Σ (U_iᵀU_i) ∘ (D_iᵀD_i) over pairs of positions, which is cheaper where an image has few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ELEMENTS = 2**21  # of a temporary result for some of the samples


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
        assert module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        self._module, self._padding, self._bias = module, module.padding, module.bias is not None

    def sum_sq_norm(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        outputs, channels, *kernel = self._module.weight.shape
        positions, fan_in = deltas[0, 0].numel(), channels * math.prod(kernel)
        by_position = positions * (outputs + fan_in) < outputs * fan_in  # fewer multiplications
        total = torch.zeros((), dtype=torch.float64, device=deltas.device)
        for some, d in self._parts(inputs, deltas, positions**2 if by_position else outputs * channels):
            if by_position:
                products = torch.zeros_like(d.mT @ d)
                for x in self._under_kernel(some, deltas):
                    products.baddbmm_(x.mT, x)
                total += products.mul_(d.mT @ d).sum(2).sum(dtype=torch.float64)
            else:
                for x in self._under_kernel(some, deltas):
                    total += _squared(torch.linalg.vector_norm(d @ x.mT, dim=2)).sum()
            if self._bias:
                total += _squared(d.sum(2)).sum()
        return total

    def sum_squares(self, inputs: Tensor, deltas: Tensor) -> list[Tensor]:
        outputs, channels, *kernel = self._module.weight.shape
        weight, bias = deltas.new_zeros(math.prod(kernel), outputs, channels), deltas.new_zeros(outputs)
        for some, d in self._parts(inputs, deltas, outputs * channels):
            for total, x in zip(weight, self._under_kernel(some, deltas), strict=True):
                total += (d @ x.mT).square_().sum(0)
            bias += d.sum(2).square_().sum(0)
        weight = weight.view(*kernel, outputs, channels).permute(2, 3, 0, 1)
        return [weight, *([bias] if self._bias else [])]

    @staticmethod
    def _parts(inputs: Tensor, deltas: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs [m, …], D [m, outputs, positions]) of some samples at a time, of which each takes so many
        `elements`."""
        count = max(1, ELEMENTS // elements)
        yield from zip(inputs.split(count), deltas.flatten(2).split(count), strict=True)

    def _under_kernel(self, inputs: Tensor, deltas: Tensor) -> Iterator[Tensor]:
        """For each element of the kernel, the inputs that it meets: [m, channels, positions]."""
        module = self._module
        (top, left), (down, right) = self._padding, module.stride
        image = F.pad(inputs, (left, left, top, top))
        height, width = down * (deltas.shape[2] - 1) + 1, right * (deltas.shape[3] - 1) + 1
        for i in range(0, module.kernel_size[0] * module.dilation[0], module.dilation[0]):
            for j in range(0, module.kernel_size[1] * module.dilation[1], module.dilation[1]):
                yield image[:, :, i : i + height : down, j : j + width : right].flatten(2)


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
