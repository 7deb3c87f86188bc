"""Every optimizer against its formula in numpy: softmax regression of handwritten digits, trained as any run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import optim
from pipeline.optim._backtracking import MOST_TRIALS, Backtracking, shrinkage
from pipeline.optim._evaluation import Evaluation
from tests.distributed import column, train_here
from tests.optim.softmax import DIGITS, Matrix, Softmax, steps, weights_of
from tests.support import config


def trained(*overrides: str) -> tuple[Softmax, list[tuple[int, int, float]], Matrix]:
    composed = config(*DIGITS, *overrides)
    run = train_here(composed)
    assert column(run, "train/loss")[-1] < column(run, "train/loss")[0]
    return Softmax(composed), steps(run), weights_of(run)


def close(found: Matrix, expected: Matrix) -> None:
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


def test_adam(home: Path):
    """With weight decay in the gradient."""
    softmax, run, found = trained("optim=adam", "optim.weight_decay=0.3", "optim.eps=1e-3")
    w, m, v = np.zeros((10, 65)), 0.0, 0.0
    for t, (first, size, lr) in enumerate(run, 1):
        g = softmax.clipped(w, first, size) + 0.3 * w
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
    close(found, w)


@pytest.mark.parametrize(
    ("delta", "projected"),
    [(1e-4, set()), (0.1, {"whole"}), (1.5, {"whole", "unit"}), (40.0, {"unit"})],
)
def test_adamp(delta: float, projected: set[str]):
    """On a matrix, a kernel and a vector, which are projected by unit, as a whole, or not."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"matrix": (5, 8), "kernel": (3, 2, 3, 3), "vector": (6,)}
    model = nn.ParameterDict(
        {k: nn.Parameter(torch.randn(s, generator=generator)) for k, s in shapes.items()}
    )
    composed = config("optim=adamp", "optim.lr=0.1", "optim.weight_decay=0.2", f"optim.delta={delta}").optim
    optimizer = optim.build(model, composed)
    expected = {k: p.detach().double().numpy().reshape(p.shape[0], -1) for k, p in model.items()}
    moments = {k: (np.zeros_like(w), np.zeros_like(w)) for k, w in expected.items()}
    seen = set()
    for t in range(1, 6):
        for key, parameter in model.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            w, g = expected[key], parameter.grad.double().numpy().reshape(parameter.shape[0], -1)
            m, v = moments[key]
            m, v = moments[key] = (0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2)
            u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            ratio, views = 1.0, [w, w.reshape(1, -1)] if key != "vector" else []
            for view in views:
                g_view, u_view = g.reshape(view.shape), u.reshape(view.shape)
                norms = np.linalg.norm(view, axis=1) * np.linalg.norm(g_view, axis=1)
                if np.abs((view * g_view).sum(1) / norms).max() < delta / math.sqrt(view.shape[1]):
                    unit = view / np.linalg.norm(view, axis=1, keepdims=True)
                    u = (u_view - unit * (unit * u_view).sum(1, keepdims=True)).reshape(w.shape)
                    ratio = 0.1
                    seen.add("unit" if view is w else "whole")
                    break
            expected[key] = (1 - 0.1 * 0.2 * ratio) * w - 0.1 * u
        optimizer.step()
    assert seen == projected
    for key, parameter in model.items():
        found = parameter.detach().double().numpy().reshape(expected[key].shape)
        np.testing.assert_allclose(found, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_adagrad_norm(home: Path, delayed: bool, per_row: bool):
    """A row of the weights, or an element of the biases, has its own sum; or all have one."""
    softmax, run, found = trained(
        "optim=adagrad_norm", f"optim.delayed={delayed}", f"optim.per_row={per_row}", "optim.accumulator=0.5"
    )
    w, sums = np.zeros((10, 65)), np.full((10, 65), 0.5)
    for first, size, lr in run:
        g, before = softmax.clipped(w, first, size), sums
        if per_row:
            rows = np.broadcast_to((g[:, :64] ** 2).sum(1, keepdims=True), (10, 64))
            sums = sums + np.c_[rows, g[:, 64] ** 2]
        else:
            sums = sums + (g**2).sum()
        w = w - lr * g / np.sqrt(before if delayed else sums)
    close(found, w)


def test_muon():
    """Newton and Schulz's iteration on the matrix inside, in float64 beside torch's bfloat16; AdamW elsewhere."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 4))
    composed = config("optim=muon", "optim.lr=0.01", "optim.weight_decay=0.2").optim
    optimizer = optim.build(model, composed)
    expected = [p.detach().double().numpy() for p in model.parameters()]
    first = [np.zeros_like(w) for w in expected]
    second = [np.zeros_like(w) for w in expected]
    inside = 1  # of the parameters: the weight of the first linear layer
    for t in range(1, 5):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape)
            g = parameter.grad.double().numpy()
            if i == inside:
                first[i] = 0.95 * first[i] + 0.05 * g
                x = 0.05 * g + 0.95 * first[i]  # Nesterov's
                x = x.T / np.linalg.norm(x)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                expected[i] = (1 - 0.01 * 0.2) * expected[i] - 0.01 * 0.2 * math.sqrt(9) * x.T
            else:
                first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.95 * second[i] + 0.05 * g**2
                u = (first[i] / (1 - 0.9**t)) / (np.sqrt(second[i] / (1 - 0.95**t)) + 1e-8)
                expected[i] = (1 - 0.01 * 0.2) * expected[i] - 0.01 * u
        optimizer.step()
    for i, parameter in enumerate(model.parameters()):
        tolerance = 5e-4 if i == inside else 1e-6  # of steps of 0.006
        np.testing.assert_allclose(parameter.detach().numpy(), expected[i], atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize(
    ("regulariser", "settings"),
    [
        ("l1", ["optim.l1=0.02"]),
        ("l2", ["optim.l2=0.5"]),
        ("elastic_net", ["optim.l1=0.02", "optim.l2=0.5"]),
        ("box", ["optim.lower=-0.01", "optim.upper=0.02"]),
    ],
)
def test_prox_sgd(home: Path, regulariser: str, settings: list[str]):
    """On weights, not on biases."""
    softmax, run, found = trained("optim=prox_sgd", f"optim.regulariser={regulariser}", *settings)
    l1 = 0.02 if regulariser in ("l1", "elastic_net") else 0.0
    l2 = 0.5 if regulariser in ("l2", "elastic_net") else 0.0
    w = np.zeros((10, 65))
    for first, size, lr in run:
        w = w - lr * softmax.clipped(w, first, size)
        inner = w[:, :64]
        if regulariser == "box":
            w[:, :64] = np.minimum(np.maximum(inner, -0.01), 0.02)
        else:
            w[:, :64] = np.where(np.abs(inner) > lr * l1, inner - np.sign(inner) * lr * l1, 0) / (1 + lr * l2)
    close(found, w)
    if l1:
        assert 0.02 < (found[:, :64] == 0).mean() < 0.9  # sparse, and not empty


def test_prox_sgd_on_the_simplex(home: Path):
    overrides = ["data=breast_cancer", "model=logistic", "model.loss=binary", "data.micro_batch=16"]
    overrides += ["batch.size=64", "budget.tokens=640", "lr.warmup_tokens=0"]
    run = train_here(config(*overrides, "optim=prox_sgd", "optim.regulariser=simplex", "optim.lr=0.5"))
    from pipeline.checkpoint import load_weights

    weights = load_weights(run)
    assert weights["linear.weight"].min() >= 0 and weights["linear.weight"].sum().item() == pytest.approx(1)
    assert (weights["linear.weight"] == 0).any() and weights["linear.bias"].item() != 0


@pytest.mark.parametrize("base", ["sgd", "adamw", "adagrad_norm"])
def test_sam_is_two_gradients_a_step(home: Path, base: str):
    """The second, at w + ρ g/‖g‖, clipped too, is what the optimizer inside steps with."""
    softmax, run, found = trained("optim=sam", f"optim.base={base}", "optim.rho=0.4", "optim.eps=1e-3")
    w, m, v, total = np.zeros((10, 65)), 0.0, 0.0, 0.01
    for t, (first, size, lr) in enumerate(run, 1):
        g = softmax.gradient(w, first, size)
        g = softmax.clipped(w + 0.4 * g / np.linalg.norm(g), first, size)
        if base == "sgd":
            m = 0.9 * m + g
            w = w - lr * m
        elif base == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        else:
            total += (g**2).sum()
            w = w - lr * g / math.sqrt(total)
    close(found, w)


NORM_TEST = ["batch=norm_test", "batch.max_size=64", "batch.eta=0.8", "batch.interval=2"]


@pytest.mark.parametrize(("test", "unit"), [(NORM_TEST, 16), ([], 1)], ids=["norm test", "constant batch"])
def test_backtracking_decreases_the_loss_of_its_samples_enough(test: list[str], unit: int, home: Path):
    """L and the weights follow; every accepted step passes the test, and the L tried before it did not. Every
    step but the last is measured, by micro-batches as the norm test is, or by samples."""
    composed = config(
        *DIGITS, "optim=backtracking", "optim.lr=8", "batch.size=32", *test, "budget.tokens=640"
    )
    run = train_here(composed)
    measured = [row.get("stat/variance") for row in run.rows() if "lr" in row]
    softmax, w, constant = Softmax(composed), np.zeros((10, 65)), 1 / 8
    shrunk, evaluations = [], 0
    for (first, size, lr), logged in zip(steps(run), measured, strict=True):
        g, before = softmax.gradient(w, first, size), softmax.loss(w, first, size)
        square, ratio = (g**2).sum(), 1.0
        if logged is not None:
            units = [softmax.gradient(w, start, unit) for start in range(first, first + size, unit)]
            variance = unit * sum(((unit - g) ** 2).sum() for unit in units) / (len(units) - 1)
            assert logged == pytest.approx(variance, rel=1e-4)
            ratio = variance / (size * square) + 1
        shrunk.append(max(1.0, 2 / ratio))
        constant /= shrunk[-1]
        evaluations += size
        while softmax.loss(w - g / constant, first, size) > before - square / (2 * constant):
            constant *= 1.5
            evaluations += size
        assert lr == pytest.approx(1 / constant, rel=1e-4)
        w = w - lr * g
        assert softmax.loss(w, first, size) <= before - lr / 2 * square + 2e-6 * before
    close(weights_of(run), w)
    assert [logged is None for logged in measured] == [*[False] * (len(measured) - 1), True]
    assert shrunk[-1] == 2 and any(1 < factor < 2 for factor in shrunk)
    assert evaluations > 640 + 5 * 32  # several trials failed
    assert column(run, "loss_evaluations")[-1] == evaluations
    assert column(run, "gradient_evaluations")[-1] == 640


def step_of_backtracking(again: Callable[[float], float]) -> tuple[float, float, int]:
    """One from w = 1e-4 on a loss 1 + w²/2, with what is computed of it: the rate, w, and how often."""
    weight, trials = nn.Parameter(torch.tensor([1e-4])), []
    optimizer = Backtracking([weight], lr=1.0)
    weight.grad = weight.detach().clone()

    def loss_again() -> float:
        trials.append(weight.item())
        return again(weight.item())

    optimizer.step(Evaluation(1, 1.0, 1e-8, 1e-8, loss_again, lambda: 0.0, 0, lambda: None))
    return optimizer.param_groups[0]["lr"], weight.item(), len(trials)


def test_backtracking_does_not_take_rounding_for_an_increase():
    ulp = 2.0**-23
    assert step_of_backtracking(lambda w: 1 + ulp) == pytest.approx((1.0, 0.0, 1), abs=1e-9)


@pytest.mark.parametrize(
    ("squared_norm", "variance", "expected"),
    [(1.0, 0.0, 2.0), (1.0, None, 2.0), (1.0, 2.0, 4 / 3), (1.0, 40.0, 1.0), (1.0, -2.0, 2.0), (1.0, -4.0, 2.0),
     (0.0, None, 1.0), (0.0, 3.0, 1.0)],
)  # fmt: skip
def test_the_first_constant_of_a_step(squared_norm: float, variance: float | None, expected: float):
    """ζ = max(1, 2/a), a = tr Σ/(|S| ‖g‖²) + 1 with |S| = 4, also with an estimate of tr Σ below 0; a step without
    a gradient tells nothing of L, which must not fall to 0 in many of them."""
    evaluation = Evaluation(4, 1.0, squared_norm, variance, lambda: 1.0, lambda: 0.0, 0, lambda: None)
    assert shrinkage(evaluation) == pytest.approx(expected)


def test_backtracking_outlasts_gradients_of_zero():
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.zeros(1)
    optimizer = Backtracking([weight], lr=0.25)
    for _ in range(200):
        optimizer.step(Evaluation(4, 1.0, 0.0, None, lambda: 1.0, lambda: 0.0, 0, lambda: None))
    assert optimizer.param_groups[0]["lr"] == 0.25 and weight.item() == 1


def test_backtracking_ends_where_no_step_lowers_the_loss():
    rate, weight, trials = step_of_backtracking(lambda w: math.nan)
    assert trials == MOST_TRIALS and rate < 1e-9 and weight == pytest.approx(1e-4, rel=1e-6)
