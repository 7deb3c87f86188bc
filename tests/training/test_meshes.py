"""One run on every mesh: the same training, and a run that moves from mesh to mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

import pipeline.train
from pipeline.batch import norm_test
from pipeline.batch._interface import Needs, State, StepDone
from pipeline.config import Config
from pipeline.gradients.statistics import GradientStatistics, Projections
from pipeline.store import RunDirectory
from pipeline.train import Trainer
from tests.distributed import column, on_ranks, ranks_of, train_here
from tests.meshes import MESHES
from tests.support import config

pytestmark = pytest.mark.slow

TRAINED = ["single", "ddp2", "ddp4", "fsdp2", "fsdp4", "hsdp2x2", "tp2", "fsdp2 x tp2"]
# 22 steps in which the norm test makes the batch four times as large. Adam divides by the size of a gradient however
# small, and so makes of rounding what it likes; with a larger eps it does not.
TINY = [
    "data.sequence_length=32", "budget.tokens=15500", "data.micro_batch=2", "lr.warmup_tokens=2k", "eval.sequences=10", "optim.eps=1e-4",
    "batch=norm_test", "batch.size=8", "batch.round_to=8", "batch.max_size=32", "batch.eta=0.3", "batch.ema=0.5", "optim.lr=6e-3",
]  # fmt: skip


def steps_of(run: RunDirectory) -> list[dict[str, object]]:
    return [row for row in run.rows() if "train/loss" in row]


def test_every_mesh_trains_alike(home: Path, small_corpus: list[str]):
    """Losses, statistics and the decisions that follow from them, over 20 steps."""
    runs = {name: train_here(config(*TINY, *small_corpus, *MESHES[name])) for name in TRAINED}
    single = runs["single"]
    sizes = column(single, "batch/size")
    assert len(sizes) >= 20 and {8, 16, 32} <= set(sizes)
    for name, run in runs.items():
        assert column(run, "batch/size") == sizes, name
        assert column(run, "batch/reason") == column(single, "batch/reason"), name
        for metric in (
            "train/loss",
            "val/loss",
            "grad/norm",
            "lr",
            "stat/mean_sq_norm",
            "stat/variance",
            "test/statistic",
        ):
            expected = column(single, metric)
            assert len(expected) >= (1 if metric == "val/loss" else 10)
            assert column(run, metric) == pytest.approx(expected, rel=1e-5), (name, metric)


def test_workers_compare_alike_wherever_their_gradients_are_seen(home: Path, small_corpus: list[str]):
    """The ranks' own gradients, accumulated over two to four micro-batches: DDP's bucket, FSDP2's layer."""
    overrides = [*TINY, *small_corpus, "batch.estimator=worker", "budget.tokens=4k"]
    ddp, *others = (train_here(config(*overrides, *MESHES[name])) for name in ("ddp4", "fsdp4", "hsdp2x2"))
    assert max(column(ddp, "batch/accumulation")) > 1 and len(column(ddp, "stat/variance")) >= 5
    for run in others:
        assert column(run, "batch/size") == column(ddp, "batch/size")
        for metric in ("train/loss", "stat/variance", "test/statistic"):
            assert column(run, metric) == pytest.approx(column(ddp, metric), rel=1e-5), metric


def some_steps(rank: int, composed: Config, path: str, attempt: int, steps: int) -> None:
    """Goes on from the newest checkpoint for so many steps, and saves."""
    trainer = Trainer(composed, RunDirectory(path), attempt, ranks_of(composed, rank))
    trainer.resume()
    for _ in range(steps):
        trainer.step()
    trainer.wishes.stop = True
    trainer.save()
    trainer.close(1)


def projections(
    rank: int,
    composed: Config,
    path: str,
    attempt: int,
    steps: int,
    direction: Literal["momentum", "previous"],
) -> list[Projections]:
    """Of each measured step, the schedule being a norm test that also asks for a direction."""

    class Projecting(norm_test.Schedule):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.needs = Needs("microbatch", direction=direction)

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.train, "schedule_class", lambda name: Projecting)
        decide = Projecting.decide

        def keep(self: Projecting, state: State, done: StepDone, statistics: GradientStatistics):
            seen.append(statistics.along)
            return decide(self, state, done, statistics)

        patch.setattr(Projecting, "decide", keep)
        some_steps(rank, composed, path, attempt, steps)
    return seen


@pytest.mark.parametrize("direction", ["momentum", "previous"])
def test_the_direction_moves_along(
    direction: Literal["momentum", "previous"], home: Path, small_corpus: list[str]
):
    """The first step after a change of mesh is projected on what the last step before it left behind."""
    single = config(*TINY, *small_corpus)
    (whole,) = on_ranks(single, projections, single, str(home / "runs/whole"), 1, 7, direction)
    moved: list[Projections] = []
    for attempt, (name, steps) in enumerate([("fsdp2", 3), ("tp2", 2), ("single", 2)], start=1):
        composed = config(*TINY, *small_corpus, *MESHES[name])
        moved += on_ranks(
            composed, projections, composed, str(home / "runs/moved"), attempt, steps, direction
        )[0]
    assert len(moved) == len(whole) == 7 and moved[0] is whole[0] is None
    for here, there in zip(moved[1:], whole[1:], strict=True):
        scale = max(map(abs, there.products))
        assert here.products == pytest.approx(there.products, abs=1e-4 * scale)
        assert here.sq_norm == pytest.approx(there.sq_norm, rel=1e-4)


def test_a_run_moves_from_mesh_to_mesh(home: Path, small_corpus: list[str]):
    """Every mesh goes on from the checkpoint of another, with the same sequences, learning rates, averages of
    the test and moments of Adam, as if nothing had happened."""
    whole = train_here(config(*TINY, *small_corpus))
    moving = RunDirectory(home / "runs" / "moving")
    order = ["single", "fsdp4", "tp2", "hsdp2x2", "ddp2", "fsdp2 x tp2", "fsdp2", "ddp4"]
    steps = [3, 3, 3, 3, 3, 2, 3, 2]
    for attempt, (name, count) in enumerate(zip(order, steps, strict=True), start=1):
        composed = config(*TINY, *small_corpus, *MESHES[name])
        on_ranks(composed, some_steps, composed, str(moving.path), attempt, count)
    moved, expected = steps_of(moving), steps_of(whole)[: sum(steps)]
    assert [row["attempt"] for row in moved] == [i + 1 for i, count in enumerate(steps) for _ in range(count)]
    for metric in ("step", "tokens", "sequences", "batch/size", "batch/reason", "lr"):
        assert [row[metric] for row in moved] == [row[metric] for row in expected], metric
    assert max(row["batch/size"] for row in expected) == 32
    for metric in ("train/loss", "grad/norm"):
        values = [row[metric] for row in expected]
        assert [row[metric] for row in moved] == pytest.approx(values, rel=1e-5), metric
    tested = [row for row in moved if "test/statistic" in row]
    assert [row["test/statistic"] for row in tested] == pytest.approx(
        [row["test/statistic"] for row in expected if "test/statistic" in row], rel=1e-4
    )
