"""The test of the complete step in whole runs: against the same run in numpy, on several ranks, interrupted, and
what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline import samples
from pipeline.checkpoint import load_weights
from pipeline.config import Config, ConfigError
from pipeline.data import permute
from pipeline.stopping import Wishes
from pipeline.store import RunDirectory
from tests.distributed import column, train_here
from tests.optim.softmax import checkpoint, tensors
from tests.support import config

TUMOURS = [
    "data=breast_cancer", "model=logistic", "model.loss=binary", "data.micro_batch=2", "batch=composite",
    "batch.size=4", "batch.max_size=400", "batch.theta=0.9", "budget.tokens=1500", "optim.clip=null",
    "lr.warmup_tokens=0", "lr.min_ratio=0.5", "eval.sequences=64", "track=disabled",
]  # fmt: skip
BOX = ["optim=prox_sgd", "optim.regulariser=box", "optim.lower=-0.05", "optim.upper=0.1", "optim.lr=0.3"]
L1 = ["optim=prox_sgd", "optim.regulariser=l1", "optim.l1=0.05", "optim.lr=0.3", "model.l2=0.01"]
PLAIN = ["optim=sgd", "optim.momentum=0", "optim.lr=0.3", "model.l2=0.01"]
SAMPLE = "batch.estimator=sample"
INNER = [SAMPLE, "batch.form=inner_product"]
Array = NDArray[np.float64]


class Numpy:
    """Logistic regression in float64 on the samples that a run reads."""

    def __init__(self, composed: Config) -> None:
        self.config = composed
        split = samples.read(composed.data)
        n, count = len(split.train_indices), composed.budget_sequences
        places = np.arange(count)
        order = split.train_indices[permute(places % n, n, composed.data.seed, places // n)]
        inputs, self.labels = split.train.at(order)
        self.inputs = np.c_[inputs.astype(np.float64), np.ones(count)]

    def gradients(self, w: Array, first: int, size: int) -> Array:
        """Of each sample, [size, 31]."""
        x, y = self.inputs[first : first + size], self.labels[first : first + size]
        return (1 / (1 + np.exp(-x @ w)) - y)[:, None] * x + self.config.model.l2 * w  # type: ignore[union-attr]

    def after(self, w: Array, g: Array, rate: float) -> Array:
        optim, moved = self.config.optim, w - rate * g
        weights = moved[:-1]
        if optim.regulariser == "box":
            weights = np.clip(weights, optim.lower, optim.upper)
        elif optim.regulariser == "l1":
            weights = np.sign(weights) * np.maximum(np.abs(weights) - rate * optim.l1, 0)
        return np.r_[weights, moved[-1]]

    def demand(self, each: Array, d: Array, rate: float) -> float:
        """As written: α² tr Σ/(θ²‖d‖²), α² Var⟨g_i, d⟩/(θ²‖d‖⁴)."""
        batch, squared = self.config.batch, d @ d
        assert batch.theta
        if batch.form == "inner_product":
            return float(rate**2 * np.var(each @ d, ddof=1) / (batch.theta**2 * squared**2))
        units = each
        if batch.estimator == "microbatch":
            units = each.reshape(-1, 2, each.shape[1]).mean(1) * math.sqrt(2)  # variance of one sample
        return float(rate**2 * units.var(axis=0, ddof=1).sum() / (batch.theta**2 * squared))


def rate_of(composed: Config, seen: int, size: int) -> float:
    """A cosine from lr to half of it, at the middle of the step."""
    progress = (seen + size / 2) / composed.budget.tokens
    return composed.optim.lr * (0.5 + 0.5 * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize(
    "overrides",
    [
        [*BOX, SAMPLE],
        [*BOX, *INNER],
        [*L1, SAMPLE],
        [*L1, *INNER, "batch.growth_cap=4"],
        [*L1, "batch.round_to=6", "batch.size=6", "batch.max_size=100"],
        [*PLAIN, "batch.theta=0.5"],
        [*PLAIN, *INNER, "batch.theta=0.3"],
    ],
    ids=" ".join,
)
def test_every_step_is_redrawn_until_it_passes(overrides: list[str], home: Path):
    """Sizes, tests and weights are those of the algorithm in numpy, which takes each gradient of an enlarged
    batch anew."""
    composed = config(*TUMOURS, *overrides)
    run = train_here(composed)
    problem, batch, multiple = Numpy(composed), composed.batch, composed.batch_multiple
    assert batch.max_size
    w, seen, size, total_redraws = np.zeros(31), 0, batch.size, 0
    largest = batch.max_size // multiple * multiple
    rows = [row for row in run.rows() if "train/loss" in row]
    for row in rows:
        last = seen + size >= composed.budget_sequences
        size, redraws = min(size, composed.budget_sequences - seen), 0
        tested = not last and size < largest
        while True:
            rate = rate_of(composed, seen, size)
            each = problem.gradients(w, seen, size)
            after = problem.after(w, each.mean(0), rate)
            demanded, left = (
                problem.demand(each, after - w, rate) if tested else math.nan,
                len(problem.labels),
            )
            limit = min(size * batch.growth_cap, largest, left - seen)
            if not tested or demanded <= size or size >= limit:
                break
            grown = min(demanded, limit)
            size = min(math.ceil(grown / multiple - 1e-9) * multiple, largest, left - seen)
            redraws += 1
        assert (row["batch/size"], row["batch/redraws"]) == (size, redraws)
        assert row["lr"] == pytest.approx(rate)
        assert row["grad/norm"] == pytest.approx(np.linalg.norm(each.mean(0)), rel=1e-4)
        assert row["batch/accumulation"] == math.ceil(size / 2)
        if tested:
            step = (after - w) / rate
            assert row["stat/step_sq_norm"] == pytest.approx(step @ step, rel=1e-3)
            assert row["test/statistic"] == pytest.approx(demanded, rel=2e-3)
            assert row["test/threshold"] == size
        w, seen = after, seen + size
        assert row["gradient_evaluations"] == row["sequences"] == seen
        assert row["epochs"] == seen / 455
        total_redraws += redraws
    assert seen == composed.budget_sequences and total_redraws > 2
    assert max(row["batch/redraws"] for row in rows) > 1 or "growth_cap" in " ".join(overrides)
    weights = load_weights(run)
    found = np.r_[weights["linear.weight"].numpy()[0], weights["linear.bias"].numpy()]
    np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)


def test_the_enlarged_gradient_is_that_of_the_whole_sample(home: Path):
    """A run that begins with the size that another has redrawn takes the same first step."""
    redrawn = train_here(config(*TUMOURS, *L1, SAMPLE, "batch.theta=0.2"))
    first = redrawn.rows()[0]
    assert first["batch/redraws"] > 0
    whole = train_here(config(*TUMOURS, *L1, SAMPLE, "batch.theta=0.2", f"batch.size={first['batch/size']}"))
    again = whole.rows()[0]
    assert again["batch/redraws"] == 0
    for name in ("train/loss", "grad/norm", "stat/variance", "stat/step_sq_norm", "lr", "test/statistic"):
        assert again[name] == pytest.approx(first[name], rel=1e-5), name


@pytest.mark.parametrize("keep", [0, 10**9], ids=["by the model's inputs", "by layers"])
def test_products_with_the_step_are_of_all_draws(keep: int, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.gradients.sample.KEPT_ELEMENTS", keep)
    network = ["model=mlp", "model.widths=[5]", "optim.lr=0.1", "batch.theta=0.2", "budget.tokens=600"]
    run = train_here(config(*TUMOURS, *L1, *INNER, *network))
    first = run.rows()[0]
    assert first["batch/redraws"] > 0
    whole = train_here(config(*TUMOURS, *L1, *INNER, *network, f"batch.size={first['batch/size']}"))
    for name in ("test/statistic", "stat/variance", "stat/step_sq_norm"):
        assert whole.rows()[0][name] == pytest.approx(first[name], rel=1e-4), name


@pytest.mark.parametrize("overrides", [[*BOX, *INNER], [*L1]], ids=["samples", "micro-batches"])
@pytest.mark.slow
def test_two_ranks_redraw_as_one(overrides: list[str], home: Path):
    wide = ["batch.size=8"]
    one = train_here(config(*TUMOURS, *overrides, *wide, "batch.round_to=4"))
    two = train_here(config(*TUMOURS, *overrides, *wide, "parallel=ddp"))
    assert sum(column(one, "batch/redraws")) > 2
    for name in ("batch/size", "batch/redraws", "gradient_evaluations"):
        assert column(two, name) == column(one, name)
    for name in ("train/loss", "test/statistic", "stat/step_sq_norm", "val/loss"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-3)


@pytest.mark.parametrize("overrides", [[*BOX, *INNER], [*L1]], ids=["samples", "micro-batches"])
def test_a_resumed_run_is_the_uninterrupted_one(overrides: list[str], home: Path):
    """Bit for bit, from a step whose batch was enlarged."""
    each = ["budget.tokens=800", "checkpoint.interval_tokens=1", "checkpoint.keep=100"]
    composed = config(*TUMOURS, *overrides, *each)
    run = train_here(composed)
    steps = column(run, "batch/redraws")
    redrawn = next(number for number, redraws in enumerate(steps, 1) if redraws)
    assert redrawn < len(steps) - 1
    whole, rows = tensors(checkpoint(run, len(steps))), logged(run)
    for step in range(redrawn + 1, len(steps) + 1):
        shutil.rmtree(checkpoint(run, step))
    train_here(composed, attempt=2)
    again = tensors(checkpoint(run, len(steps)))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert logged(run) == rows


def test_a_stop_that_is_seen_before_a_redraw_ends_that_step(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Looks are rare: that of the first sum of the step finds the request, those of the others come too soon."""
    looks = iter([True])
    monkeypatch.setattr(Wishes, "_stop_requested", lambda wishes: next(looks, False))
    run = train_here(config(*TUMOURS, *L1, SAMPLE, "batch.theta=0.2"))
    (row,) = run.rows()
    assert row["batch/redraws"] > 0 and [path.name for path in run.complete_checkpoints()] == [
        "step-00000001"
    ]


def logged(run: RunDirectory) -> list[dict[str, Any]]:
    times = ("time", "wall", "attempt", "throughput/tokens_per_s")
    return [{key: value for key, value in row.items() if key not in times} for row in run.rows()]


@pytest.mark.slow
def test_at_a_constrained_solution_the_test_of_the_gradient_stops_and_that_of_the_step_goes_on(home: Path):
    """Xie et al.'s argument. The gradient's norm does not vanish at the solution, so that the norm test is
    content with tr Σ/(η²‖∇F‖²) samples for ever, and the objective stays in the noise of so many."""
    short = ["experiment=xie2020_small", "budget.tokens=60k", "eval.interval_tokens=4k"]
    rows = [
        "batch=composite batch.form=norm batch.theta=0.5",
        "batch=composite batch.form=inner_product batch.theta=0.5",
        "batch=norm_test batch.eta=0.5",
    ]
    norm, inner, pointwise = (train_here(config(*short, *row.split())) for row in rows)
    assert column(pointwise, "exact/grad_norm")[-1] > 0.1
    variance, gradient = column(pointwise, "exact/variance")[-1], column(pointwise, "exact/grad_norm")[-1]
    sizes = column(pointwise, "batch/size")
    assert 64 < max(sizes) < 1.5 * variance / (0.5**2 * gradient**2) < 1000
    assert len(set(sizes[len(sizes) // 2 : -1])) == 1
    for composite in (norm, inner):
        assert max(column(composite, "batch/size")) == 5568
        gaps, others = column(composite, "exact/gap"), column(pointwise, "exact/gap")
        assert min(gaps[-5:]) < min(others[-5:]) / 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=adam"], "optim=adam: batch.schedule=composite knows the step that follows from a gradient alone"),
        (["optim=swa", "optim.base=sgd"], "Use optim=prox_sgd, or optim=sgd optim.momentum=0"),
        (["optim=sgd"], "optim.momentum=0.9: batch.schedule=composite tests a step that follows from the gradient"),
        ([*PLAIN, "optim.weight_decay=0.1"], "Use optim.weight_decay=0, and model.l2 or optim=prox_sgd for a penal"),
        ([*L1, "optim.clip=1"], "optim.clip=1.0: batch.schedule=composite tests the step along the whole gradient"),
        ([*L1, "batch.theta=null"], "batch.theta=null: batch.schedule=composite needs it. A usual choice: 0.9"),
        ([*L1, "batch.form=inner_product"], "batch.estimator=sample; or use batch.form=norm"),
        ([*L1, "batch.estimator=paper", "parallel=ddp"], "is known for batch.estimator=microbatch or sample"),
        ([*L1, "parallel=fsdp"], "parallel=fsdp: batch.schedule=composite takes more samples into a step"),
        ([*L1, "parallel=ddp", "sync=local_sgd"], "sync=local_sgd: batch.schedule=composite tests one step of all"),
        ([*L1, "batch.max_size=null"], "needs a cap"),
        ([*L1, "batch.size=2"], "the variance needs two micro-batches"),
        ([*L1, SAMPLE, "batch.size=1", "data.micro_batch=1"], "the variance needs two samples"),
        ([*L1, "batch.form=nrom"], "Did you mean norm?"),
    ],
)  # fmt: skip
def test_refusals(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*TUMOURS, *overrides)
    assert message in str(refused.value)
