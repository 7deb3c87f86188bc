"""Gradients of the last steps whose mean stands for a noisy one in batch tests: against the same run in numpy,
interrupted, on two ranks, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.identity import run_id
from tests.distributed import column, train_here
from tests.optim.softmax import checkpoint, tensors
from tests.support import config
from tests.training.test_composite import Numpy, logged

TUMOURS = [
    "data=breast_cancer", "model=logistic", "model.loss=binary", "data.micro_batch=2", "batch.size=4",
    "batch.max_size=400", "batch.ema=0", "batch.averaged_steps=3", "batch.averaged_ratio=0.9", "optim=sgd",
    "optim.momentum=0", "optim.lr=0.3", "optim.clip=null", "lr.warmup_tokens=0", "lr.min_ratio=1",
    "model.l2=0.01", "budget.tokens=1200", "eval.sequences=64", "track=disabled",
]  # fmt: skip
INNER = [
    "batch=inner_product", "batch.estimator=sample", "batch.direction=in_sample", "batch.theta=0.5",
    "batch.nu=1.5",
]  # fmt: skip
NORM = ["batch=norm_test", "batch.estimator=sample", "batch.eta=0.9"]


@pytest.mark.parametrize("overrides", [INNER, [*INNER, "batch.interval=2"], NORM], ids=" ".join)
def test_the_mean_stands_in_for_a_gradient_much_longer(overrides: list[str], home: Path):
    """After three steps of one batch, and in the tests alone."""
    composed = config(*TUMOURS, *overrides)
    run = train_here(composed)
    problem, batch = Numpy(composed), composed.batch
    w, seen, gradients, sizes, stood = np.zeros(31), 0, [], [], 0
    rows = [row for row in run.rows() if "train/loss" in row]
    for number, row in enumerate(rows, 1):
        size = row["batch/size"]
        each = problem.gradients(w, seen, size)
        g = each.mean(0)
        gradients.append(g)
        sizes.append(size)
        used = g
        if len(sizes) >= 3 and len(set(sizes[-3:])) == 1:
            mean = np.mean(gradients[-3:], axis=0)
            if mean @ mean < 0.9**2 * g @ g:
                used = mean
        if number < len(rows) and number % batch.interval == 0:
            stood += used is not g
            assert ("stat/averaged_sq_norm" in row) == (used is not g)
            trace, along = each.var(axis=0, ddof=1).sum(), np.var(each @ used, ddof=1) / (used @ used)
            if batch.schedule == "norm_test":
                demanded = trace / 0.9**2 / (used @ used)
            else:
                demanded = max(along / 0.5**2, (trace - along) / 1.5**2) / (used @ used)
            assert row["test/statistic"] == pytest.approx(demanded, rel=2e-3)
            assert row["stat/mean_sq_norm"] == pytest.approx(g @ g, rel=1e-4)
        w, seen = w - 0.3 * g, seen + size
    assert stood > 2 and len(set(sizes)) > 2


def test_a_resumed_run_is_the_uninterrupted_one(home: Path):
    """Bit for bit, of the whole method, from before a step in which the mean stood for the gradient."""
    late = ["optim=backtracking", "checkpoint.interval_tokens=360", "budget.tokens=500"]
    composed = config(*TUMOURS, *INNER, *late, "batch.theta=0.9", "batch.nu=5.84")
    run = train_here(composed)
    rows = logged(run)
    steps = [row for row in rows if "train/loss" in row]
    stood = [row["step"] for row in steps if "stat/averaged_sq_norm" in row]
    assert len(stood) > 2
    assert checkpoint(run, stood[-1] - 1).exists()
    whole = tensors(checkpoint(run, len(steps)))
    shutil.rmtree(checkpoint(run, len(steps)))
    train_here(composed, attempt=2)
    again = tensors(checkpoint(run, len(steps)))
    assert all(again[name].equal(whole[name]) for name in whole)
    assert any("recent.2" in name for name in whole)
    assert logged(run) == rows


@pytest.mark.slow
def test_two_ranks_decide_as_one(home: Path):
    one = train_here(config(*TUMOURS, *INNER, "batch.round_to=4"))
    two = train_here(config(*TUMOURS, *INNER, "parallel=ddp"))
    assert column(two, "batch/size") == column(one, "batch/size")
    averaged = column(one, "stat/averaged_sq_norm")
    assert len(averaged) > 2 and column(two, "stat/averaged_sq_norm") == pytest.approx(averaged, rel=1e-3)


def test_it_is_part_of_a_run_only_where_it_is_asked_for():
    plain = [*TUMOURS, *NORM, "batch.averaged_steps=null"]
    assert run_id(config(*plain)) == run_id(config(*plain, "batch.averaged_ratio=0.5"))
    assert run_id(config(*plain)) != run_id(config(*plain, "batch.averaged_steps=10"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*NORM, "batch.averaged_steps=1"], "batch.averaged_steps=1: a mean needs two. Nearest: 2"),
        ([*NORM, "batch.averaged_ratio=1.5"], "batch.averaged_ratio=1.5: must be at most 1"),
        ([*NORM, "batch.signal=debiased"], "Use batch.signal=plain or batch.averaged_steps=null"),
        (["batch=norm_test", "parallel=fsdp"], "parallel=fsdp sync=allreduce: averages the whole gradient"),
        ([*INNER, "batch.direction=previous"], "Use batch.direction=in_sample batch.estimator=sample, or"),
    ],
)
def test_refusals(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*TUMOURS, *overrides)
    assert message in str(refused.value)
