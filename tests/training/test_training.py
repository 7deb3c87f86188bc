"""The training loop against an independent truth: itself repeated, on other ranks, interrupted; by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import pipeline.train
from pipeline import checkpoint
from pipeline.data import Stream, prepare
from pipeline.model.init import initialise
from pipeline.model.llama import Llama, loss_sum
from pipeline.record import Diverged
from pipeline.store import RunDirectory, read_rows
from tests.distributed import column, train_here
from tests.support import config

# 50 steps of 16 sequences of 64 tokens
TINY = [
    "data.sequence_length=64",
    "batch.size=16",
    "budget.tokens=51200",
    "lr.warmup_tokens=5k",
    "eval.sequences=16",
]


def test_repeat_is_bit_identical_and_two_ranks_agree(home: Path, small_corpus: list[str]):
    """Same seed and config: the same losses to the last bit. One rank or two: to float32 rounding."""
    one = train_here(config(*TINY, *small_corpus))
    losses, norms = column(one, "train/loss"), column(one, "grad/norm")
    assert len(losses) == 50 and losses[-1] < losses[0] - 1
    one.path.rename(home / "first")
    again = train_here(config(*TINY, *small_corpus))
    assert column(again, "train/loss") == losses
    assert column(again, "val/loss") == column(RunDirectory(home / "first"), "val/loss")

    two = train_here(config(*TINY, *small_corpus, "parallel=ddp"))
    assert column(two, "batch/accumulation") == [2] * 50
    # Rounding, which Adam's first steps (nearly sign steps) then amplify
    assert column(two, "train/loss")[:5] == pytest.approx(losses[:5], rel=1e-6)
    assert column(two, "train/loss") == pytest.approx(losses, rel=1e-4)
    assert column(two, "grad/norm")[:5] == pytest.approx(norms[:5], rel=1e-5)
    assert column(two, "val/loss") == pytest.approx(column(again, "val/loss"), rel=1e-5)


def test_equals_a_loop_written_by_hand(home: Path, small_corpus: list[str]):
    """Whole batches in one backward pass, torch's own clipping and AdamW."""
    composed = config(*TINY, *small_corpus)
    run = train_here(composed)
    stream = Stream(prepare(composed.data, home / "corpora").train, 64, composed.data.seed)
    model = Llama(composed.model)
    initialise(model, composed.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(50):
        tokens = torch.from_numpy(stream.read(16 * step, 16))
        loss = loss_sum(model(tokens[:, :-1]), tokens[:, 1:]) / (16 * 64)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen = (step + 0.5) * 1024
        progress = max(0, seen - 5000) / (51200 - 5000)
        cosine = 0.1 + 0.9 * (1 + torch.tensor(progress * torch.pi).cos().item()) / 2
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, seen / 5000) * cosine
        optimizer.step()
        losses.append(loss.item())
    assert column(run, "train/loss")[:5] == pytest.approx(losses[:5], rel=1e-6)
    assert column(run, "train/loss") == pytest.approx(losses, rel=1e-4)


def reads_of(run_overrides: list[str]) -> tuple[RunDirectory, list[int]]:
    """A finished run and every sequence position it trained on, in order."""
    read: list[int] = []

    class Recorder(pipeline.train.Prefetcher):
        def take(self, first: int, count: int):
            read.extend(range(first, first + count))
            return super().take(first, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.train, "Prefetcher", Recorder)
        return train_here(config(*run_overrides)), read


def test_frozen_norm_test_is_the_constant_run(home: Path, small_corpus: list[str]):
    """The same sequences in the same order, and measuring changes no bit of the training."""
    common = [*TINY, *small_corpus]
    constant, constant_reads = reads_of([*common, "batch=constant", "batch.size=16"])
    # eta so large that the test always passes: it measures every step and never grows
    frozen = ["batch=norm_test", "batch.size=16", "batch.max_size=64", "batch.eta=1000"]
    tested, tested_reads = reads_of([*common, *frozen])
    assert tested_reads == constant_reads == list(range(800))
    assert column(tested, "train/loss") == column(constant, "train/loss")
    assert len(column(tested, "stat/variance")) == 49  # the last step has nothing to decide
    assert column(constant, "stat/variance") == []


def test_norm_test_grows_and_decides_alike_on_one_and_two_ranks(home: Path, small_corpus: list[str]):
    overrides = [*TINY, *small_corpus, "batch=norm_test", "batch.size=8", "batch.max_size=128", "batch.eta=0.5",
                 "batch.round_to=8"]  # fmt: skip
    one = train_here(config(*overrides))
    two = train_here(config(*overrides, "parallel=ddp"))
    sizes = column(one, "batch/size")
    assert sizes[0] == 8 and max(sizes) > 16
    assert sum(sizes) == 800 and all(size % 8 == 0 for size in sizes[:-1])
    assert column(two, "batch/size") == sizes
    for name in ("stat/variance", "stat/mean_sq_norm", "test/statistic"):
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-3)


def test_ends_on_the_budget_with_short_and_empty_units(home: Path, small_corpus: list[str]):
    """37 sequences in steps of 16 on two ranks: the last step has 5, one rank a unit of 4, the other of 1."""
    overrides = [*TINY, *small_corpus, "budget.tokens=2400", "lr.warmup_tokens=0"]
    one = train_here(config(*overrides))
    two = train_here(config(*overrides, "parallel=ddp"))
    assert column(one, "batch/size") == [16, 16, 5]
    assert [row["tokens"] for row in one.rows()][-1] == 37 * 64 <= 2400
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), rel=1e-5)
    three = train_here(config(*overrides, "parallel=ddp", "parallel.replicate=3", "batch.size=12"))
    assert column(three, "batch/size") == [12, 12, 12, 1]
    assert sum(column(three, "train/loss")) > 0


@pytest.mark.parametrize(
    "schedule",
    [
        ["batch=norm_test", "lr.batch_scaling=sqrt"],
        ["batch=inner_product", "batch.direction=previous", "batch.confirmations=3"],
        ["batch=noise_scale", "batch.monotone=false", "batch.interval=2"],
        ["batch=linear", "batch.ramp_tokens=40k", "optim=sgd", "lr.batch_scaling=adascale"],
        ["batch=seesaw", "lr.cut_factor=1.1", "lr.batch_scaling=sqrt"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_resumed_equals_uninterrupted(schedule: list[str], home: Path, small_corpus: list[str]):
    """From a checkpoint in the middle of a growing batch: every later number is the same to the last bit."""
    overrides = [*TINY, *small_corpus, *schedule, "batch.size=8", "batch.max_size=64",
                 "checkpoint.interval_tokens=10k", "eval.interval_tokens=10k"]  # fmt: skip
    composed = config(*overrides)
    whole = train_here(composed)
    whole = RunDirectory(whole.path.rename(home / "whole"))
    assert [p.name for p in whole.complete_checkpoints()][-1] == f"step-{whole.rows()[-1]['step']:08d}"
    assert len(whole.complete_checkpoints()) == 2

    interrupted = RunDirectory.of(composed)
    saved = {row["step"] for row in whole.rows() if "val/loss" in row}
    steps = column(whole, "step")
    stop_after = next(step for step in steps[len(steps) // 2 :] if step not in saved)

    class Stopped(Exception):
        pass

    class Stopping(pipeline.train.Trainer):
        def step(self) -> None:
            if self.progress.step == stop_after:
                raise Stopped
            super().step()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pipeline.train, "Trainer", Stopping)
        train_here(composed)
    train_here(composed, attempt=2)
    assert {row["attempt"] for row in interrupted.rows()} == {1, 2}
    for name in ("tokens", "train/loss", "batch/size", "batch/requested", "batch/reason", "lr", "lr/batch_factor",
                 "stat/variance", "test/statistic", "val/loss"):  # fmt: skip
        assert column(interrupted, name) == column(whole, name)
    assert len(read_rows(interrupted.metrics_file)) > len(interrupted.rows())  # some steps were done twice


@pytest.mark.parametrize(("before", "after"), [("single", "ddp"), ("ddp", "single")])
def test_resumes_on_another_number_of_ranks(before: str, after: str, home: Path, small_corpus: list[str]):
    """Stopped in the middle of a growing batch and continued on another mesh: the same numbers to rounding,
    the same sequences, the same learning rates."""
    overrides = [*TINY, *small_corpus, "batch=norm_test", "batch.size=8", "batch.max_size=256", "batch.round_to=8",
                 "batch.hold_tokens=12k", "checkpoint.interval_tokens=20k", "lr.batch_scaling=sqrt"]  # fmt: skip
    first, second = config(*overrides, f"parallel={before}"), config(*overrides, f"parallel={after}")
    whole = train_here(first)
    whole = RunDirectory(whole.path.rename(home / "whole"))
    middle = whole.complete_checkpoints()[0]
    progress = json.loads((middle / "progress.json").read_text())
    assert 0 < progress["sequences"] < first.budget_sequences

    run = RunDirectory.of(second)
    run.freeze(second)
    shutil.copytree(middle, run.checkpoints / middle.name)
    shutil.copy(whole.metrics_file, run.metrics_file)
    train_here(second, attempt=2)
    resumed = [row for row in run.rows() if "train/loss" in row and row["attempt"] == 2]
    expected = [row for row in whole.rows() if "train/loss" in row and row["step"] > progress["step"]]
    for name in ("step", "tokens", "batch/size", "lr"):
        assert [row[name] for row in resumed] == [row[name] for row in expected]
    assert len(resumed) >= 3 and resumed[-2]["batch/size"] > 8
    for name in ("train/loss", "grad/norm"):
        values = [row[name] for row in expected]
        assert [row[name] for row in resumed] == pytest.approx(values, rel=2e-3)
    assert resumed[0]["train/loss"] == pytest.approx(expected[0]["train/loss"], rel=1e-6)
    assert resumed[1]["train/loss"] == pytest.approx(expected[1]["train/loss"], rel=1e-5)  # Adam's state too
    assert checkpoint.load_weights(run).keys() == Llama(first.model).state_dict().keys()


def test_diverging_run_fails_with_step_and_cause(home: Path, small_corpus: list[str]):
    composed = config(*TINY, *small_corpus, "optim.lr=1e18", "optim.clip=null", "lr.warmup_tokens=0")
    with pytest.raises(Diverged, match=r"step \d+: training loss (nan|inf).*optim.lr=1e\+18 too high"):
        train_here(composed)
    last = RunDirectory.of(composed).rows()[-1]
    assert not torch.isfinite(torch.tensor(last["train/loss"]))


def test_a_model_that_is_not_finite_fails_and_is_not_saved(home: Path, small_corpus: list[str]):
    """The last update ruins it: only the evaluation can see that."""
    overrides = ["optim.lr=1e38", "optim.weight_decay=1e9", "lr.min_ratio=1.0", "lr.warmup_tokens=0"]
    composed = config(*TINY, *small_corpus, *overrides, "budget.tokens=1024")
    with pytest.raises(Diverged, match="step 1: validation loss nan"):
        train_here(composed)
    run = RunDirectory.of(composed)
    assert run.complete_checkpoints() == [] and column(run, "step") == [1, 1]


def test_bfloat16_trains_to_nearly_the_same_loss(home: Path, small_corpus: list[str]):
    plain = column(train_here(config(*TINY, *small_corpus)), "train/loss")
    rounded = column(train_here(config(*TINY, *small_corpus, "parallel.precision=bfloat16")), "train/loss")
    assert rounded == pytest.approx(plain, rel=2e-2)
    assert max(abs(a - b) for a, b in zip(rounded, plain, strict=True)) > 1e-4  # it did compute in bfloat16


@pytest.mark.parametrize("estimator", ["worker", "paper"])
def test_worker_estimators_train_on_two_ranks_with_a_tied_head(
    estimator: str, home: Path, small_corpus: list[str]
):
    overrides = ["batch=norm_test", "batch.size=8", "batch.max_size=64", f"batch.estimator={estimator}"]
    composed = config(*TINY, *small_corpus, *overrides, "parallel=ddp", "model.tied=true")
    run = train_here(composed)
    assert column(run, "tokens")[-1] == composed.budget_tokens
    assert all(value > 0 for value in column(run, "stat/variance"))
