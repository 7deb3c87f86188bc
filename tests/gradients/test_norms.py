"""Squared norms against float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.gradients.norms import FLAT_ROW, SquaredNorm, inner_products
from pipeline.gradients.worker import gram_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,), (FLAT_ROW,), (FLAT_ROW * 2 + 3,), ()])
def test_equals_float64(shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert SquaredNorm([x], 1, CPU)([x]).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_precise_where_a_float32_norm_is_not():
    x = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    truth = x.double().square().sum().item()
    ours = abs(SquaredNorm([x], 1, CPU)([x]).item() / truth - 1)
    assert ours < 1e-7 < abs(torch.linalg.vector_norm(x).double().square().item() / truth - 1)


def test_several_tensors_and_reuse():
    norm = SquaredNorm([torch.empty(2, 2), torch.empty(3)], 1, CPU)
    for scale in (1.0, 2.0):
        tensors = [torch.full((2, 2), scale), torch.full((3,), scale)]
        assert norm(tensors).item() == pytest.approx(7 * scale**2)


def test_inner_products_of_large_tensors():
    """A million elements each: to 1e-8 of the product of the norms."""
    rows, vector = torch.randn(3, 2**20 + 5), torch.randn(2**20 + 5)
    truth = rows.double() @ vector.double()
    scale = rows.double().norm(dim=1) * vector.double().norm()
    assert ((inner_products(rows, vector) - truth).abs() < 5e-8 * scale).all()


@pytest.mark.parametrize("shared", [False, True])
def test_a_variance_survives_the_gram_matrix(shared: bool):
    """Rows that differ by a tenth of their mean: their variance is a difference of sums 100 times as large.
    With shares, as of columns that tensor-parallel ranks have copies of."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2**20 + 3, generator=generator)
    rows = mean + 0.1 * torch.randn(4, 2**20 + 3, generator=generator)
    shares = torch.rand(2**20 + 3, generator=generator) if shared else torch.ones(2**20 + 3)
    exact = rows.double()
    variance = float((shares.double() * (exact - exact.mean(0)).square()).sum() / 3)
    gram = gram_matrix(rows, shares if shared else None)
    assert float(gram.diag().sum() - gram.sum() / 4) / 3 == pytest.approx(variance, rel=1e-5)
