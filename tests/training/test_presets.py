"""Every row of every preset for two cores trains: its optimizer, statistics and mesh fit together."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import yaml

from pipeline.config import ClassifierConfig
from tests.distributed import column, train_here
from tests.support import ROOT, config

SMALL = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*_small.yaml"))
SHORT = ["lr.warmup_tokens=2k", "batch.start_tokens=0", "batch.interval=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_row_trains(name: str, home: Path, small_corpus: list[str]):
    experiment = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
    labelled = isinstance(config(f"experiment={name}").model, ClassifierConfig)
    text = [*small_corpus, *SHORT, "budget.tokens=40k", "model.layers=1"]
    samples = ["lr.warmup_tokens=0", "budget.tokens=800", "track.exact_gradient=false"]
    for row in experiment["hydra"]["sweeper"]["rows"]:
        composed = config(
            f"experiment={name}", *row.split(), *(samples if labelled else text), "eval.sequences=8"
        )
        run = train_here(composed)
        assert column(run, "tokens")[-1] == composed.budget_tokens
        losses = column(run, "train/loss")
        if labelled:  # whose loss in a step of few samples is mostly noise
            half = len(losses) // 2
            losses = [mean(losses[:half]), mean(losses[half:])]
        assert losses[-1] < losses[0], row
        needs_statistics = composed.batch_plan().sizes is None
        assert bool(column(run, "test/statistic")) == needs_statistics, row
