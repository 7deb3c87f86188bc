from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.model._rms_norm import RMSNorm


def norms(width: int, dtype: torch.dtype) -> tuple[nn.RMSNorm, RMSNorm]:
    theirs, ours = nn.RMSNorm(width, eps=1e-5, dtype=dtype), RMSNorm(width, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        weight = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.5
        for norm in (theirs, ours):
            norm.weight.copy_(weight)
    return theirs, ours


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 65, 384), (3, 48), (2, 3, 5, 16)])
def test_it_is_pytorchs_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    results = []
    for norm in norms(shape[-1], dtype):
        x = random(*shape, seed=1, dtype=dtype).requires_grad_()
        y = norm(x)
        y.backward(random(*shape, seed=2, dtype=dtype))
        results.append((y, x.grad, norm.weight.grad))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)


def test_it_keeps_its_input_alone() -> None:
    saved: list[int] = []
    x = random(4, 65, 384, seed=1).requires_grad_()
    for norm in norms(384, torch.float32):
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.__setitem__(-1, saved[-1] + t.numel() * (t.data_ptr() != x.data_ptr())) or t,
            lambda t: t,
        ):
            norm(x)
    theirs, ours = saved
    assert ours == 4 * 65 + 384 < theirs / 90  # a number for each row, and the weight


def test_gradients_of_samples_by_vmap() -> None:
    def gradients(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        def loss(weight: Tensor, x: Tensor) -> Tensor:
            return (torch.func.functional_call(norm, {"weight": weight}, (x[None],)) ** 3).sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)

    theirs, ours = norms(48, torch.float64)
    x, weight = random(5, 7, 48, seed=1, dtype=torch.float64), theirs.weight.detach()
    torch.testing.assert_close(gradients(ours, weight, x), gradients(theirs, weight, x))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    _, ours = norms(16, torch.float64)
    x = random(3, 16, seed=1, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad((ours(x) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient.sum().backward()
