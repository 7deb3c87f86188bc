"""CoDA against its formula in numpy, of one model and of four replicas; interrupted; what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import samples
from pipeline.checkpoint import load_weights
from pipeline.config import Config, ConfigError
from pipeline.identity import run_id
from pipeline.problem import problem_of
from pipeline.store import RunDirectory
from tests.distributed import column, ranks_of, train_here
from tests.optim.softmax import checkpoint, tensors
from tests.support import config

# Steps of 16 samples; stages of 4, 8 and, cut short, 16 steps, which do not end where replicas meet.
AUC = [
    "data=breast_cancer", "model=logistic", "model.loss=auc", "optim=coda", "optim.lr=0.3", "batch.size=16",
    "budget.tokens=320", "optim.stage_tokens=64", "optim.stage_growth=2", "optim.proximity=0.7",
    "lr.warmup_tokens=0", "eval.sequences=100",
]  # fmt: skip
ONE = ["data.micro_batch=16"]
REPLICAS = ["data.micro_batch=4", "parallel=ddp", "parallel.replicate=4", "sync=local_sgd", "sync.period=3"]

Vector = NDArray[np.float64]  # 30 weights, the bias, a, b, α


def gradient(v: Vector, inputs: Vector, labels: NDArray[np.int64], p: float) -> Vector:
    """Of the mean of F over these samples in everything, not reversed; derived by hand from
    F = (1 − p)(h − a)²[y = 1] + p(h − b)²[y = 0] + 2(1 + α)(p h [y = 0] − (1 − p) h [y = 1]) − p(1 − p)α²."""
    weights, (bias, a, b, alpha) = v[:30], v[30:]
    h = 1 / (1 + np.exp(-(inputs @ weights + bias)))
    positive = labels == 1
    of_score = np.where(
        positive,
        2 * (1 - p) * (h - a) - 2 * (1 + alpha) * (1 - p),
        2 * p * (h - b) + 2 * (1 + alpha) * p,
    )
    of_logit = of_score * h * (1 - h)
    of_a = np.where(positive, -2 * (1 - p) * (h - a), 0).mean()
    of_b = np.where(positive, 0, -2 * p * (h - b)).mean()
    of_alpha = np.where(positive, -2 * (1 - p) * h, 2 * p * h).mean() - 2 * p * (1 - p) * alpha
    return np.r_[inputs.T @ of_logit / len(h), of_logit.mean(), of_a, of_b, of_alpha]


def share_of_positives(composed: Config) -> float:
    split = samples.read(composed.data)
    return float(split.train.labels[split.train_indices].mean())


def recomputed(composed: Config, rates: list[float]) -> tuple[list[Vector], Vector]:
    """By replica where it ends, and what all are drawn to then."""
    micro, ranks = composed.data.micro_batch, composed.parallel.data_ranks
    period = composed.sync.period if ranks > 1 else 1
    stream, p = problem_of(composed, ranks_of(composed)).train, share_of_positives(composed)
    v = [np.zeros(34) for _ in range(ranks)]
    drawn_to, visited, clip = np.zeros(34), [], composed.optim.clip
    for step, rate in enumerate(rates, 1):
        for rank in range(ranks):
            inputs, labels = stream.read(((step - 1) * ranks + rank) * micro, micro)
            g = gradient(v[rank], inputs.astype(float), labels, p)
            g[33] *= -1  # up
            if clip is not None:
                g *= min(1, clip / np.linalg.norm(g))
            drawn = (v[rank] - drawn_to) / 0.7
            drawn[33] = 0  # not α
            v[rank] = v[rank] - rate * (g + drawn)
        visited.append(np.mean(v, axis=0))
        if step in (4, 12):
            drawn_to, visited = np.mean(visited, axis=0), []
            v = [drawn_to] * ranks
        elif step % period == 0:
            v = [visited[-1]] * ranks
    return v, drawn_to


def as_vector(kept: dict[str, NDArray[np.float32]], prefix: str, suffix: str = "") -> Vector:
    names = ("scorer.linear.weight", "scorer.linear.bias", "saddle")
    return np.concatenate(
        [np.asarray(kept[f"{prefix}{name}{suffix}"]).ravel() for name in names], dtype=np.float64
    )


@pytest.mark.parametrize("clip", ["null", "0.3"])
@pytest.mark.parametrize(
    "mesh", [ONE, pytest.param(REPLICAS, marks=pytest.mark.slow)], ids=["one", "replicas"]
)
def test_it_is_its_formula(home: Path, mesh: list[str], clip: str):
    composed = config(*AUC, *mesh, f"optim.clip={clip}", "lr.min_ratio=1")
    run = train_here(composed)
    rates = column(run, "lr")
    assert rates == pytest.approx([0.3] * 4 + [0.15] * 8 + [0.075] * 8)
    ends, drawn_to = recomputed(composed, rates)
    assert np.abs(drawn_to).max() > 0.05
    found = as_vector(load_weights(run), "")  # type: ignore[arg-type]
    np.testing.assert_allclose(found, np.mean(ends, axis=0), rtol=2e-4, atol=2e-6)
    kept = tensors(checkpoint(run, 20))
    of_replica = [f"replica-{rank}." for rank in range(4)] if mesh == REPLICAS else [""]
    for prefix, end in zip(of_replica, ends, strict=True):
        np.testing.assert_allclose(as_vector(kept, f"{prefix}model."), end, rtol=2e-4, atol=2e-6)
        reference = as_vector(kept, f"{prefix}optimizer.state.", ".reference")
        np.testing.assert_allclose(reference, drawn_to, rtol=2e-4, atol=2e-6)
        np.testing.assert_array_equal(
            reference, as_vector(kept, f"{of_replica[0]}optimizer.state.", ".reference")
        )


def test_a_run_that_ends_with_a_stage_ends_with_its_mean(home: Path):
    composed = config(*AUC, *ONE, "budget.tokens=192", "lr.min_ratio=1")
    run = train_here(composed)
    _, mean = recomputed(composed, column(run, "lr"))
    np.testing.assert_allclose(as_vector(load_weights(run), ""), mean, rtol=2e-4, atol=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mesh", [ONE, pytest.param(REPLICAS, marks=pytest.mark.slow)], ids=["one", "replicas"]
)
def test_resumed_within_a_stage_it_is_the_uninterrupted_one(home: Path, mesh: list[str]):
    """Bit for bit: from step 8 of a stage of the steps 5 to 12, to step 14."""
    composed = config(*AUC, *mesh, "checkpoint.interval_tokens=128", "budget.stop_tokens=224")
    run = train_here(composed)
    whole, rows = tensors(checkpoint(run, 14)), logged(run)
    shutil.rmtree(checkpoint(run, 14))
    train_here(composed, attempt=2)
    again = tensors(checkpoint(run, 14))
    assert [row["attempt"] for row in run.rows() if "lr" in row] == [1] * 8 + [2] * 6
    assert again.keys() == whole.keys() and all(again[name].equal(whole[name]) for name in whole)
    assert logged(run) == rows


def logged(run: RunDirectory) -> list[dict[str, object]]:
    def kept(key: str) -> bool:
        return key not in ("time", "wall", "attempt", "throughput/tokens_per_s") and "wait_s" not in key

    return [{key: value for key, value in row.items() if kept(key)} for row in run.rows()]


def test_its_settings_are_part_of_the_id():
    known = run_id(config(*AUC, *ONE))
    for setting in ("stage_tokens=65", "stage_growth=3", "proximity=0.8", "lr=0.2"):
        assert run_id(config(*AUC, *ONE, f"optim.{setting}")) != known
    assert run_id(config(*AUC, *ONE, "optim.momentum=0.5", "optim.base=adamw")) == known


FSDP = ["parallel=fsdp", "parallel.shard=2", "data.micro_batch=8"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.loss=binary"],
         "optim=coda model=logistic model.loss=binary: it looks for the saddle point of the AUC loss. Use model.loss=auc"),
        (["optim.lr=0.8"], "optim.lr=0.8: above optim.proximity=0.7, a step would lead beyond the point that it is "
                           "drawn to. Nearest optim.lr: 0.7"),
        ([*REPLICAS, "sync=wagma"], "optim=coda sync=wagma: a stage ends with the mean over all replicas. Use sync=local"),
        (FSDP, "optim=coda parallel=fsdp: needs a, b and α of the loss on a rank. Use parallel=single or parallel=ddp"),
        (["optim=swa", "optim.base=coda"], "optim.base=coda: has stages and means of its own. Use optim=coda, or another "
                                           "optim.base with optim=swa"),
        (["optim.weight_decay=0.1"], "optim=coda has no weight decay"),
        (["optim.stage_growth=1"], "optim.stage_growth"),
        (["lr.batch_scaling=linear"], "is not defined for optim=coda, which has none"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_run(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*AUC, *ONE, *overrides)
    assert message in str(refused.value)


def test_refuses_a_language_model():
    with pytest.raises(
        ConfigError, match=r"optim=coda model=tiny: it looks for .* Use model\.loss=auc with a model of"
    ):
        config("optim=coda")
