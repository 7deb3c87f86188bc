"""A method under the trainer: a run that goes on from a checkpoint ends as the whole run did."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from pipeline.config import Config
from pipeline.data import prepare
from pipeline.store import RunDirectory, Status
from pipeline.train import train
from tests.distributed import column, gloo_ranks, ranks_of
from tests.support import config

# 20 steps on two ranks, with checkpoints after steps 7, 14 and 20
SMALL = [
    "model.width=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64", "data.sequence_length=32",
    "batch.size=8", "budget.tokens=5120", "lr.warmup_tokens=512", "eval.sequences=8", "eval.interval_tokens=1k",
    "checkpoint.interval_tokens=1792", "checkpoint.keep=3", "sync.consensus=true",
    "parallel=ddp", "parallel.replicate=2",
]  # fmt: skip


def resumed_after_7_steps(home: Path, *overrides: str) -> tuple[RunDirectory, RunDirectory]:
    """The whole run, and the one that has its steps from 8 on done again, after these overrides are checked."""
    composed = config(*SMALL, *overrides)
    whole, cut = RunDirectory(home / "whole"), RunDirectory(home / "cut")
    for run in (whole, cut):
        run.write_status(Status("RUNNING"))
    prepare(composed.data, home / "corpora", report=print)
    gloo_ranks(2, _rank, composed, whole, cut)
    return whole, cut


def _rank(rank: int, composed: Config, whole: RunDirectory, cut: RunDirectory) -> None:
    ranks = ranks_of(composed, rank)
    assert train(composed, whole, 1, ranks)
    if ranks.is_main:
        shutil.copytree(whole.checkpoints / "step-00000007", cut.checkpoints / "step-00000007")
        shutil.copy(whole.metrics_file, cut.metrics_file)
    dist.barrier()
    assert train(composed, cut, 2, ranks)


def assert_same_from_step_8(whole: RunDirectory, cut: RunDirectory, *names: str) -> None:
    """Bit for bit; `names`: columns of the record besides those that every method has."""
    assert column(whole, "step")[-1] == 20
    again = [row for row in cut.rows() if row["attempt"] == 2]
    for name in ("train/loss", "grad/norm", "sync/consensus", "val/loss", *names):
        expected = [row[name] for row in whole.rows() if name in row and row["step"] > 7]
        assert expected and [row[name] for row in again if name in row] == expected, name
