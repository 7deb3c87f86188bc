"""Proximal operators against their definition, argmin_u h(u) + ‖u − v‖²/(2α), minimised by scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, minimize, minimize_scalar

from pipeline.optim._proximal import box, elastic_net, proximal, simplex
from tests.support import config

Vector = NDArray[np.float64]

PENALTIES: dict[str, tuple[list[str], Callable[[float], float]]] = {
    "l1": (["optim.l1=0.7"], lambda u: 0.7 * abs(u)),
    "l2": (["optim.l2=1.3"], lambda u: 0.65 * u * u),
    "elastic_net": (["optim.l1=0.7", "optim.l2=1.3"], lambda u: 0.7 * abs(u) + 0.65 * u * u),
    "box": (["optim.lower=-0.5", "optim.upper=0.25"], lambda u: 0.0 if -0.5 <= u <= 0.25 else np.inf),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("rate", [0.1, 1.0, 2.5])
def test_separable_operators_minimise_their_definition(name: str, rate: float):
    settings, h = PENALTIES[name]
    operator = proximal(config("optim=prox_sgd", f"optim.regulariser={name}", *settings).optim)
    values = np.concatenate([np.random.default_rng(0).normal(0, 2, 12), [0.0, 0.05, -0.05]])
    found = operator(torch.from_numpy(values), rate).numpy()
    for v, u in zip(values, found, strict=True):
        bounds = (-0.5, 0.25) if name == "box" else (-10.0, 10.0)
        best = minimize_scalar(
            lambda x, v=v: h(x) + (x - v) ** 2 / (2 * rate),
            bounds=bounds,
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert u == pytest.approx(best.x, abs=2e-5)
        # An l1 term has a kink at 0, where a search only comes near.
        assert h(u) + (u - v) ** 2 / (2 * rate) <= best.fun + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_the_simplex_minimises_its_definition(seed: int):
    v = np.random.default_rng(seed).normal(0, [0.2, 1, 3, 0.01][seed], 7)
    found = simplex(torch.from_numpy(v), 0.3).numpy()
    best = minimize(
        lambda u: ((u - v) ** 2).sum() / 0.6,
        np.full(7, 1 / 7),
        jac=lambda u: (u - v) / 0.3,
        bounds=[(0, None)] * 7,
        constraints=LinearConstraint(np.ones((1, 7)), 1, 1),
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert found == pytest.approx(best.x, abs=1e-5)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_the_simplex_is_a_projection(values: list[float]):
    """Feasible, and at an obtuse angle to all of the set: ⟨v − u, e_i − u⟩ ≤ 0 at every corner."""
    v = torch.tensor([values], dtype=torch.float64)
    u = simplex(v, 1.0)
    assert u.shape == v.shape and u.min() >= 0 and u.sum().item() == pytest.approx(1.0)
    corners = torch.eye(len(values), dtype=torch.float64) - u
    assert (corners @ (v - u)[0]).max() <= 1e-9 * (1 + v.abs().max())
    torch.testing.assert_close(simplex(u, 1.0), u)


def test_one_sided_boxes_and_a_strength_of_zero():
    v = torch.tensor([[-2.0, 0.5, 3.0]])
    assert box(0.0, None)(v, 1.0).tolist() == [[0.0, 0.5, 3.0]]
    assert box(None, 1.0)(v, 1.0).tolist() == [[-2.0, 0.5, 1.0]]
    assert elastic_net(0.0, 0.0)(v, 1.0).tolist() == v.tolist()
