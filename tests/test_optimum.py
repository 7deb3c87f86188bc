"""F* of convex problems: against scikit-learn, a Newton method written out, and separable samples."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

import pipeline.optimum
from pipeline import samples
from pipeline.optimum import Minimum, minimise, minimum
from tests.support import config

TUMOURS = ("data=breast_cancer", "model=logistic", "lr.warmup_tokens=0", "budget.tokens=1000")
DIGITS = ("data=digits", "model=logistic", "lr.warmup_tokens=0", "budget.tokens=1000")


def training_samples(*overrides: str) -> tuple[Any, Any]:
    """Inputs [n, d] and labels."""
    split = samples.read(config(*overrides).data)
    inputs, labels = split.train.at(split.train_indices)
    return inputs.reshape(len(inputs), -1).astype(np.float64), labels


def log_loss(x: Any, labels: Any, weights: Any, l2: float) -> float:
    """Of the logits x·weights [n, classes], whatever the classes."""
    logits = x @ weights
    each = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return float((each - logits[np.arange(len(x)), labels]).mean() + l2 / 2 * (weights**2).sum())


@pytest.mark.parametrize("whole", [True, False], ids=["Hessian", "conjugate gradients"])
@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_digits_as_scikit_learn(l2: float, whole: bool, monkeypatch: pytest.MonkeyPatch):
    linear = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(pipeline.optimum, "WHOLE_HESSIAN", 10**6 if whole else 0)
    x, labels = training_samples(*DIGITS)
    found = minimise(x, labels, 10, l2)
    x = np.hstack([x, np.ones((len(x), 1))])  # it does not penalise its own intercept
    model = linear.LogisticRegression(C=1 / (len(x) * l2), fit_intercept=False, tol=1e-10, max_iter=1000,
                                      solver="newton-cg").fit(x, labels)  # fmt: skip
    assert found.loss == pytest.approx(log_loss(x, labels, model.coef_.T, l2), rel=1e-10)
    assert found.relative_gradient is not None and found.relative_gradient <= 1e-10


@pytest.mark.parametrize("whole", [True, False], ids=["Hessian", "conjugate gradients"])
@pytest.mark.parametrize("scale", ["data.standardise=true", "data.standardise=false"])
def test_two_classes_as_newtons_method_written_out(scale: str, whole: bool, monkeypatch: pytest.MonkeyPatch):
    """Features as measured differ by a factor of a million."""
    monkeypatch.setattr(pipeline.optimum, "WHOLE_HESSIAN", 10**6 if whole else 0)
    x, labels = training_samples(*TUMOURS, scale)
    found = minimise(x, labels, 1, 1e-3)
    x = np.hstack([x, np.ones((len(x), 1))])
    w = np.zeros(31)

    def objective(w: Any) -> float:
        return float(np.logaddexp(0, x @ w).mean() - (labels * (x @ w)).mean() + 1e-3 / 2 * w @ w)

    for _ in range(60):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - labels) / len(x) + 1e-3 * w
        hessian = x.T @ ((p * (1 - p))[:, None] * x) / len(x) + 1e-3 * np.eye(31)
        step = np.linalg.solve(hessian, gradient)
        w = min((w - t * step for t in 0.5 ** np.arange(30)), key=objective)
    assert np.linalg.norm(gradient) < 1e-9
    assert found.loss == pytest.approx(objective(w), rel=1e-11)


@pytest.mark.parametrize("whole", [True, False], ids=["Hessian", "conjugate gradients"])
def test_without_l2_two_classes_have_one_minimum_in_either_form(whole: bool, monkeypatch: pytest.MonkeyPatch):
    """Two features do not separate the tumours. With two outputs the Hessian is singular."""
    monkeypatch.setattr(pipeline.optimum, "WHOLE_HESSIAN", 10**6 if whole else 0)
    x, labels = training_samples(*TUMOURS, "data.standardise=true")
    one, two = (minimise(x[:, :2], labels, outputs, 0.0) for outputs in (1, 2))
    assert one.loss == pytest.approx(two.loss, rel=1e-12)
    weights = np.random.default_rng(0).normal(size=(3, 2))
    assert one.loss is not None and one.loss < log_loss(
        np.hstack([x[:, :2], np.ones((len(x), 1))]), labels, weights, 0
    )


@pytest.mark.parametrize("whole", [True, False], ids=["Hessian", "conjugate gradients"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_separated_samples_have_no_minimum(
    some: bool, outputs: int, whole: bool, monkeypatch: pytest.MonkeyPatch
):
    """Some: a third feature that one sample alone has, whose weight grows without end."""
    monkeypatch.setattr(pipeline.optimum, "WHOLE_HESSIAN", 10**6 if whole else 0)
    x, labels = training_samples(*TUMOURS, "data.standardise=true")
    if some:
        x = np.hstack([x[:, :2], np.eye(len(x))[:, 7:8]])
    found = minimise(x, labels, outputs, 0.0)
    assert found.loss is None and "no finite weights minimise it. Use model.l2" in found.why
    assert minimise(x, labels, outputs, 1e-3).loss is not None


def test_the_same_problem_is_solved_once(home: Path, monkeypatch: pytest.MonkeyPatch):
    first = minimum(config(*DIGITS, "model.l2=0.01"))
    monkeypatch.setattr(pipeline.optimum, "minimise", lambda *arguments: pytest.fail("solved again"))
    same = ["seed=1", "data.seed=2", "data.micro_batch=2", "optim=sgd", "batch.size=16", "parallel=ddp"]
    assert minimum(config(*DIGITS, "model.l2=0.01", *same)) == first
    (file,) = (home / "optima").glob("*.json")
    assert json.loads(file.read_text())["loss"] == first.loss  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["", '{"loss": 0.1, "wh', '{"lost": 0.1}', "[]"])
def test_a_damaged_file_is_made_again(damage: str, home: Path):
    first = minimum(config(*DIGITS, "model.l2=0.01"))
    (file,) = (home / "optima").glob("*.json")
    whole = file.read_text()
    file.write_text(damage)
    assert minimum(config(*DIGITS, "model.l2=0.01")) == first
    assert file.read_text() == whole


@pytest.mark.parametrize("other", ["model.l2=0.02", "data.validation_fraction=0.3", "data.standardise=true"])
def test_another_problem_has_another_minimum(other: str, home: Path):
    one, two = minimum(config(*DIGITS, "model.l2=0.01")), minimum(config(*DIGITS, "model.l2=0.01", other))
    assert one and two and one.loss != two.loss


def test_a_network_has_no_known_minimum(home: Path):
    assert (
        minimum(config("data=digits", "model=mlp", "model.l2=0.1", "lr.warmup_tokens=0", "budget.tokens=1k"))
        is None
    )
    assert not (home / "optima").exists()


def _asked(folder: str) -> tuple[Minimum | None, int]:
    os.environ["CRESCENDO_HOME"] = folder
    calls = []
    solve = pipeline.optimum.minimise
    pipeline.optimum.minimise = lambda *arguments: calls.append(1) or solve(*arguments)  # type: ignore[func-returns-value]
    return minimum(config(*DIGITS, "model.l2=0.01")), len(calls)


@pytest.mark.slow
def test_of_processes_that_ask_at_once_one_solves(home: Path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        answers = pool.map(_asked, [str(home)] * 3, chunksize=1)
    assert len({answer for answer, _ in answers}) == 1 and sum(solved for _, solved in answers) == 1


# --- with the h of a proximal optimizer -----------------------------------------------------------------------

# The penalties, and how far the positive and the negative part of a weight may go.
REGULARISED = {
    "l1": (["l1=0.02"], 0.02, 0.0, (None, None)),
    "elastic_net": (["l1=0.02", "l2=0.1"], 0.02, 0.1, (None, None)),
    "box": (["lower=-0.1", "upper=0.2"], 0.0, 0.0, (0.2, 0.1)),
    "simplex": ([], 0.0, 0.0, (1.0, 0.0)),
}


@pytest.mark.parametrize("name", REGULARISED)
def test_composite_as_scipy(name: str, home: Path):
    """The difference of two parts that are not negative: |w| is their sum, and all of it is smooth."""
    overrides, l1, l2, (positive_bound, negative_bound) = REGULARISED[name]
    problem = [*TUMOURS, "model.loss=binary", "model.l2=0.001", "optim=prox_sgd", f"optim.regulariser={name}"]
    inputs, labels = training_samples(*problem)
    x, signs = np.c_[inputs, np.ones(len(inputs))], 2 * labels - 1
    is_weight = np.r_[np.ones(30), 0.0]  # the bias is not regularised

    def objective(parts: Any) -> tuple[float, Any]:
        positive, negative = np.split(parts, 2)
        w = positive - negative
        margins = signs * (x @ w)
        slope = -x.T @ (signs / (1 + np.exp(margins))) / len(x) + 0.001 * w + l2 * is_weight * w
        value = np.logaddexp(0, -margins).mean() + 0.001 / 2 * w @ w + l2 / 2 * is_weight @ w**2
        value += l1 * is_weight @ (positive + negative)
        return value, np.r_[slope + l1 * is_weight, -slope + l1 * is_weight]

    bounds = [(0, positive_bound)] * 30 + [(0, None)] + [(0, negative_bound)] * 30 + [(0, None)]
    sums = [{"type": "eq", "fun": lambda parts: parts[:30].sum() - 1}] if name == "simplex" else []
    start = np.full(62, 1 / 30) if name == "simplex" else np.zeros(62)
    options = {"maxiter": 2000, "ftol": 1e-15}
    solved = minimize(
        objective, start, jac=True, bounds=bounds, constraints=sums, method="SLSQP", options=options
    )

    found = minimum(config(*problem, *(f"optim.{setting}" for setting in overrides)))
    assert found and found.loss == pytest.approx(solved.fun, rel=1e-8)
    free = minimum(config(*TUMOURS, "model.loss=binary", "model.l2=0.001", "optim=sgd"))
    assert free and free.loss and found.loss > free.loss + 0.01
