"""Squared norms against float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.gradients.norms import FLAT_ROW, SquaredNorm

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,), (FLAT_ROW,), (FLAT_ROW * 2 + 3,), ()])
def test_equals_float64(shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert SquaredNorm([shape], CPU)([x]).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_precise_where_a_float32_norm_is_not():
    x = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    truth = x.double().square().sum().item()
    ours = abs(SquaredNorm([x.shape], CPU)([x]).item() / truth - 1)
    assert ours < 1e-7 < abs(torch.linalg.vector_norm(x).double().square().item() / truth - 1)


def test_several_tensors_and_reuse():
    norm = SquaredNorm([(2, 2), (3,)], CPU)
    for scale in (1.0, 2.0):
        tensors = [torch.full((2, 2), scale), torch.full((3,), scale)]
        assert norm(tensors).item() == pytest.approx(7 * scale**2)
