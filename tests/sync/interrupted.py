"""A method under the trainer, with an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.store import RunDirectory
from tests.distributed import column, gloo_ranks, train_here, train_rank
from tests.support import config
from tests.training.test_checkpoint import interruption

# 60 steps of 4 ranks.
TINY = (
    "parallel=ddp", "parallel.replicate=4", "model.width=32", "model.heads=2", "model.kv_heads=2",
    "model.ffn=64", "data.sequence_length=32", "data.micro_batch=2", "batch.size=8", "lr.warmup_tokens=2k",
    "budget.tokens=15360", "eval.sequences=8", "sync.consensus=true",
)  # fmt: skip


def whole_and_resumed(
    home: Path, patch: pytest.MonkeyPatch, *overrides: str
) -> tuple[RunDirectory, RunDirectory]:
    """A run at one go, and one that was asked to stop after step 5 and went on."""
    composed = config(*TINY, *overrides)
    patch.setenv("CRESCENDO_HOME", str(home / "whole"))
    whole = train_here(composed)
    patch.setenv("CRESCENDO_HOME", str(home / "resumed"))
    run = RunDirectory.of(composed)
    run.freeze(composed)
    gloo_ranks(4, _stopped_rank, composed, str(run.path), 5)
    assert 5 <= column(run, "step")[-1] < 60  # it stopped, when all had heard of it
    run.clear_stop()
    train_here(composed, attempt=2)
    assert column(run, "step") == column(whole, "step")
    return whole, run


def _stopped_rank(rank: int, composed: Config, path: str, step: int) -> None:
    with interruption("stop", step):
        train_rank(rank, composed, path)
