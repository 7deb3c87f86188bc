"""The objective and its gradient over all samples: against numpy's, per-sample gradients one by one, other ranks."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline import checkpoint, samples
from pipeline.config import Config, ConfigError, to_tree
from pipeline.exact import Exact
from pipeline.export import export
from pipeline.identity import run_id
from pipeline.problem import problem_of
from pipeline.store import RunDirectory, thawed
from pipeline.worker import Outcome, end
from tests.distributed import column, ranks_of, train_here
from tests.support import config

DIGITS = ["model=logistic", "data=digits", "model.l2=0.01", "optim=sgd", "optim.lr=0.1", "optim.clip=null",
          "lr.warmup_tokens=0", "batch.size=32", "track.exact_gradient=true"]  # fmt: skip
TUMOURS = ["model=mlp", "model.widths=[5]", "data=breast_cancer", "data.standardise=true", "model.l2=0.01",
           "optim=sgd", "lr.warmup_tokens=0", "batch.size=16", "budget.tokens=160", "eval.interval_tokens=80",
           "track.exact_gradient=true"]  # fmt: skip
EXACT = ("exact/loss", "exact/grad_norm", "exact/grad_error", "exact/variance")
Array = NDArray[np.float64]


def training_samples(config: Config) -> tuple[Array, NDArray[np.int64]]:
    """Inputs [n, d + 1] with a column of ones, and labels."""
    split = samples.read(config.data)
    inputs, labels = split.train.at(split.train_indices)
    return np.hstack([inputs.reshape(len(inputs), -1), np.ones((len(inputs), 1))]).astype(np.float64), labels


def by_hand(x: Array, labels: NDArray[np.int64], weights: Array, l2: float) -> tuple[float, Array]:
    """Softmax regression: F, and the gradient of each sample [n, d + 1, classes]."""
    logits = x @ weights
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), labels]).mean() + l2 / 2 * (weights**2).sum()
    p[np.arange(len(x)), labels] -= 1
    return loss, x[:, :, None] * p[:, None, :] + l2 * weights


def weights_of(run: RunDirectory) -> Array:
    """[d + 1, classes]"""
    found = checkpoint.load_weights(run)
    return torch.cat([found["linear.weight"].T, found["linear.bias"][None]]).double().numpy()


def test_logistic_regression_equals_numpys(home: Path):
    composed = config(*DIGITS, "budget.tokens=32")
    run = train_here(composed)
    (row,) = [row for row in run.rows() if "val/loss" in row]
    x, labels = training_samples(composed)
    loss, each = by_hand(x, labels, weights_of(run), 0.01)
    assert row["exact/loss"] == pytest.approx(loss, rel=1e-12)
    assert row["exact/grad_norm"] == pytest.approx(np.linalg.norm(each.mean(0)), rel=1e-10)

    # Of the step, whose gradient was taken at w = 0.
    _, each = by_hand(x, labels, np.zeros((65, 10)), 0.01)
    mean = each.mean(0)
    inputs, drawn = problem_of(composed, ranks_of(composed)).train.read(0, 32)
    batch = np.hstack([inputs.reshape(32, -1), np.ones((32, 1))])
    sampled = by_hand(batch, drawn, np.zeros((65, 10)), 0.01)[1].mean(0)
    error = np.linalg.norm(sampled - mean) / np.linalg.norm(mean)
    assert row["exact/grad_error"] == pytest.approx(error, rel=1e-5) and error > 0.1
    assert row["exact/variance"] == pytest.approx(((each - mean) ** 2).sum() / (len(x) - 1), rel=1e-12)


def test_a_proximal_term_is_part_of_the_objective(home: Path):
    """Of weights, not of biases; the gradient is that of F."""
    composed = config(*DIGITS, "budget.tokens=96", "optim=prox_sgd", "optim.regulariser=elastic_net",
                      "optim.l1=0.01", "optim.l2=0.2")  # fmt: skip
    run = train_here(composed)
    (row,) = [row for row in run.rows() if "val/loss" in row]
    weights = weights_of(run)
    loss, each = by_hand(*training_samples(composed), weights, 0.01)
    penalty = 0.01 * np.abs(weights[:-1]).sum() + 0.1 * (weights[:-1] ** 2).sum()
    assert row["exact/loss"] == pytest.approx(loss + penalty, rel=1e-10) and penalty > 1e-3
    assert row["exact/grad_norm"] == pytest.approx(np.linalg.norm(each.mean(0)), rel=1e-10)
    assert 0 < row["exact/gap"] < row["exact/loss"]


NETWORKS = {
    "mlp": TUMOURS,
    "mlp binary": [*TUMOURS, "model.loss=binary"],
    "mlp auc": [*TUMOURS, "model.loss=auc", "model.l2=0"],
    "cnn": [*TUMOURS, "model=cnn", "model.widths=[2,3]", "data=digits", "data.validation_fraction=0.9"],
    "resnet18": [*TUMOURS, "model=resnet18", "model.widths=[2,2,4,4]", "data=digits", "data.validation_fraction=0.98"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", NETWORKS.values(), ids=NETWORKS)
def test_variance_of_a_network_is_that_of_its_samples_one_by_one(overrides: list[str], home: Path):
    composed = config(*overrides)
    problem = problem_of(composed, ranks_of(composed))
    model = problem.model().to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    parameters = list(model.parameters())
    inputs, targets = problem.tensors(problem.train.read(0, problem.samples or 0), torch.device("cpu"))
    each = []
    for i in range(len(inputs)):
        loss = problem.loss(model, inputs[i : i + 1], targets[i : i + 1])
        each.append(torch.cat([g.view(-1) for g in torch.autograd.grad(loss, parameters)]).double())
    stacked = torch.stack(each)
    exact = Exact(composed, problem, ranks_of(composed))
    exact.compare(parameters, [p.detach() for p in parameters])
    found = exact.evaluate(parameters)
    assert found["exact/variance"] == pytest.approx(stacked.var(0).sum().item(), rel=1e-4)
    assert found["exact/grad_norm"] == pytest.approx(stacked.mean(0).norm().item(), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.slow
def test_two_ranks_find_what_one_finds(strategy: str, home: Path):
    two = train_here(config(*TUMOURS, f"parallel={strategy}"))
    one = train_here(config(*TUMOURS))
    assert len(column(two, "exact/loss")) == 2
    for name in EXACT:
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-4)


@pytest.mark.slow
def test_ranks_with_samples_of_their_own_sum_over_all(home: Path):
    composed = config(*DIGITS, "budget.tokens=64", "parallel=ddp", "data.distribution=by_rank")
    run = train_here(composed)
    x, labels = training_samples(composed)
    loss, each = by_hand(x, labels, weights_of(run), 0.01)
    assert column(run, "exact/loss") == [pytest.approx(loss, rel=1e-12)]
    assert column(run, "exact/grad_norm") == [pytest.approx(np.linalg.norm(each.mean(0)), rel=1e-10)]
    assert column(run, "epochs")[-1] == 64 / len(x)


def test_it_changes_nothing_and_takes_no_training_time(home: Path, monkeypatch: pytest.MonkeyPatch):
    plain = config(*TUMOURS, "track.exact_gradient=false")
    run = train_here(plain)
    assert not any(name.startswith("exact/") for row in run.rows() for name in row)
    losses = column(run, "train/loss")
    run.path.rename(home / "plain")

    clock = [0.0]  # seconds that are not there

    def slowly(self: Exact) -> tuple[float, torch.Tensor]:
        clock[0] += 1000
        return objective(self)

    objective, now = Exact._objective, time.perf_counter
    monkeypatch.setattr(Exact, "_objective", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + clock[0])
    composed = config(*TUMOURS)
    assert run_id(composed) == run_id(plain)
    run = train_here(composed)
    assert clock[0] == 4000  # twice in each of two evaluations
    assert column(run, "train/loss") == losses
    assert column(run, "time")[-1] < 500


def test_the_estimate_of_a_test_is_unbiased(home: Path):
    """Over an epoch at weights that stand still, statistics of micro-batches average to the exact variance."""
    norm_test = ["batch=norm_test", "batch.size=64", "batch.max_size=128", "batch.eta=1000",
                 "data.micro_batch=2", "optim.lr=1e-12"]  # fmt: skip
    run = train_here(config(*DIGITS, *norm_test, "budget.tokens=1500"))
    estimates = np.array(column(run, "stat/variance"))
    (exact,) = column(run, "exact/variance")
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exact) < 3 * error < 0.05 * exact


def test_replicas_are_measured_at_their_mean(home: Path):
    local = ["parallel=ddp", "sync=local_sgd", "sync.period=100", "data.micro_batch=4", "budget.tokens=160"]
    composed = config(*DIGITS, *local)
    run = train_here(composed)
    (row,) = [row for row in run.rows() if "val/loss" in row]
    x, labels = training_samples(composed)
    loss, each = by_hand(x, labels, weights_of(run), 0.01)  # a checkpoint holds the mean as the model
    assert row["exact/loss"] == pytest.approx(loss, rel=1e-9)
    assert row["exact/grad_norm"] == pytest.approx(np.linalg.norm(each.mean(0)), rel=1e-7)
    assert "exact/grad_error" not in row  # each replica has a gradient of its own


def test_epochs_count_full_gradients(home: Path):
    run = train_here(config(*DIGITS, "budget.tokens=96", "track.exact_gradient=false"))
    assert column(run, "epochs") == [32 / 1438, 64 / 1438, 96 / 1438, 96 / 1438]


def test_gap_is_above_the_minimum_and_falls(home: Path):
    run = train_here(config(*DIGITS, "budget.tokens=2000", "eval.interval_tokens=500"))
    gaps = column(run, "exact/gap")
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0
    (file,) = (home / "optima").glob("*.json")
    assert f'"loss": {column(run, "exact/loss")[0] - gaps[0]:.6f}'[:-1] in file.read_text()


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_at_scikit_learns_weights_the_gap_is_nil(loss: str, home: Path):
    linear = pytest.importorskip("sklearn.linear_model")
    logistic = ["model=logistic", "model.widths=[]", "model.l2=0.001", f"model.loss={loss}"]
    composed = config(*(DIGITS if loss == "cross_entropy" else [*TUMOURS, *logistic]))
    l2 = getattr(composed.model, "l2", 0.0)
    x, labels = training_samples(composed)
    model = linear.LogisticRegression(C=1 / (len(x) * l2), fit_intercept=False, tol=1e-12, max_iter=1000,
                                      solver="newton-cg").fit(x, labels)  # fmt: skip
    weights = torch.from_numpy(model.coef_)
    found = Exact(composed, problem_of(composed, ranks_of(composed)), ranks_of(composed)).evaluate(
        [weights[:, :-1], weights[:, -1]]
    )
    assert abs(found["exact/gap"]) < 1e-13 and found["exact/grad_norm"] < 1e-6
    moved = Exact(composed, problem_of(composed, ranks_of(composed)), ranks_of(composed)).evaluate(
        [weights[:, :-1] * 1.01, weights[:, -1]]
    )
    assert moved["exact/gap"] > 1e-6


def test_without_a_minimum_it_is_said_once(home: Path, capfd: pytest.CaptureFixture[str]):
    """30 features separate the tumours."""
    tumours = ["model=logistic", "model.widths=[]", "model.l2=0"]
    run = train_here(config(*TUMOURS, *tumours))
    assert column(run, "exact/gap") == [] and len(column(run, "exact/loss")) == 2
    assert capfd.readouterr().out.count("exact/gap is not recorded") == 1


def test_refused_for_text():
    with pytest.raises(ConfigError, match=r"exact_gradient=true model=tiny.*Use track.exact_gradient=false"):
        config("track.exact_gradient=true")


def test_runs_from_before_the_setting_are_read():
    tree = to_tree(config(*DIGITS))
    del tree["track"]["exact_gradient"]
    assert not thawed(tree).track.exact_gradient


def test_a_finished_run_says_what_is_true_of_samples(home: Path, capfd: pytest.CaptureFixture[str]):
    run = train_here(config(*DIGITS, "budget.tokens=64"))
    end(run, Outcome("DONE", 0))
    told = capfd.readouterr().out
    assert "2 steps, 64 samples in" in told and "transformers" not in told
    with pytest.raises(ConfigError, match="model=logistic, of which transformers has no form"):
        export(run, home / "exported")
