"""The area under the ROC curve in whole runs: of both losses that score, and of replicas, whose mean is evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from pipeline.checkpoint import load_weights
from pipeline.config import Config
from pipeline.problem import problem_of
from pipeline.store import RunDirectory
from tests.distributed import column, ranks_of, train_here
from tests.support import config

SCORED = [
    "data=breast_cancer", "model=logistic", "optim=sgd", "optim.lr=0.1", "batch.size=16", "lr.warmup_tokens=0",
    "eval.sequences=114", "eval.interval_tokens=160", "budget.tokens=480",
]  # fmt: skip
RANKS = ["data.micro_batch=4", "parallel=ddp", "parallel.replicate=4", "data.distribution=by_rank"]


def of_saved_weights(composed: Config, run: RunDirectory) -> float:
    """By scipy's ranks, of the logits: a sigmoid changes no rank."""
    weights = {name.removeprefix("scorer."): w.numpy() for name, w in load_weights(run).items()}
    inputs, labels = problem_of(composed, ranks_of(composed)).held_out.read(0, 114)
    scores = inputs @ weights["linear.weight"][0] + weights["linear.bias"]
    positive, negative = scores[labels == 1], scores[labels == 0]
    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


@pytest.mark.parametrize("loss", ["auc", "binary"])
def test_the_auc_is_that_of_the_scores(loss: str, home: Path):
    composed = config(*SCORED, f"model.loss={loss}", "data.micro_batch=16", "optim.lr=0.02")
    run = train_here(composed)
    assert column(run, "val/auc")[-1] == pytest.approx(of_saved_weights(composed, run), abs=2e-3)
    assert 0.9 < column(run, "val/auc")[-1] < 1
    assert len(column(run, "val/accuracy")) == (3 if loss == "binary" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["allreduce", "local_sgd", "wagma"])
def test_replicas_train_it_and_their_mean_is_evaluated(sync: str, home: Path):
    """The last step, the 30th, is not one in which all meet."""
    composed = config(*SCORED, *RANKS, "model.loss=auc", f"sync={sync}", "sync.period=7")
    run = train_here(composed)
    areas, losses = column(run, "val/auc"), column(run, "train/loss")
    assert len(areas) == 3 and areas[-1] > 0.9
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert areas[-1] == pytest.approx(of_saved_weights(composed, run), abs=2e-3)
