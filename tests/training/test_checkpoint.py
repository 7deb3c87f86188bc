"""Checkpoints: whatever interrupts a run or damages what it saved, it ends as if nothing had been."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

import pipeline.record
import pipeline.stopping
import pipeline.train
from pipeline import checkpoint
from pipeline.batch._interface import Decision, State
from pipeline.checkpoint import Checkpointer, CheckpointError, Progress
from pipeline.config import Config, ConfigError
from pipeline.data import prepare
from pipeline.parallel._ranks import Ranks
from pipeline.plain_reader import index_of
from pipeline.store import MetricsWriter, RunDirectory, Status
from pipeline.train import train
from tests.disk import fill
from tests.distributed import column, gloo_ranks, ranks_of, train_here
from tests.support import config
from tests.training.test_worker import frozen, start

# Some 60 steps of a batch that grows again and again; a checkpoint every 15 steps at first.
TINY = [
    "model.width=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64", "data.sequence_length=32",
    "batch=norm_test", "batch.size=8", "batch.max_size=64", "batch.hold_tokens=1k", "lr.batch_scaling=sqrt",
    "lr.warmup_tokens=2k", "budget.tokens=20k", "eval.sequences=8", "eval.interval_tokens=3k",
    "checkpoint.interval_tokens=4k",
]  # fmt: skip
DETERMINED = (
    "step", "tokens", "sequences", "train/loss", "grad/norm", "lr", "batch/size", "batch/requested",
    "stat/variance", "test/statistic", "val/loss",
)  # fmt: skip


class Crash(Exception):
    pass


@contextlib.contextmanager
def interruption(how: str, step: int) -> Iterator[None]:
    """The next training is stopped on request after this step, or dies there."""

    class Interrupted(pipeline.train.Trainer):
        def step(self) -> None:
            if how == "crash" and self.progress.step == step:
                raise Crash
            if how == "stop" and self.progress.step == step - 1 and self.ranks.is_main:
                self.run.request_stop()
            super().step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.train, "Trainer", Interrupted)
        patch.setattr(pipeline.stopping, "STOP_INTERVAL_S", 0.0)
        yield


def train_until(composed: Config, how: str, step: int, attempt: int = 1) -> RunDirectory:
    with interruption(how, step), contextlib.suppress(Crash):
        train_here(composed, attempt)
    run = RunDirectory.of(composed)
    run.clear_stop()
    return run


def assert_same_record(run: RunDirectory, whole: RunDirectory) -> None:
    for name in DETERMINED:
        assert column(run, name) == column(whole, name), name


def changes(sizes: list[int]) -> list[int]:
    """The steps after which another batch was decided that the next step then applies."""
    return [step for step in range(1, len(sizes) - 1) if sizes[step] != sizes[step - 1]]


def steps_saved(run: RunDirectory) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in run.complete_checkpoints()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_corpus: list[str]) -> RunDirectory:
    """The uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRESCENDO_HOME", str(tmp_path_factory.mktemp("whole")))
        patch.setenv("WANDB_MODE", "disabled")
        run = train_here(config(*TINY, *small_corpus))
    assert len(changes(column(run, "batch/size"))) >= 3
    assert column(run, "val/loss")[1:]
    return run


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, small_corpus: list[str]) -> RunDirectory:
    """The same run, stopped after 35 steps with two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRESCENDO_HOME", str(tmp_path_factory.mktemp("cut")))
        patch.setenv("WANDB_MODE", "disabled")
        run = train_until(config(*TINY, *small_corpus), "stop", 35)
    saved = steps_saved(run)
    assert len(saved) == 2 and saved[-1] == 35
    return run


def copy_of(run: RunDirectory, composed: Config) -> RunDirectory:
    """`run` as this test's own."""
    copy = RunDirectory.of(composed)
    shutil.copytree(run.path, copy.path)
    return copy


# --- interrupted and resumed


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_at_random_steps_equals_uninterrupted(
    seed: int, whole: RunDirectory, home: Path, small_corpus: list[str]
):
    """Bit for bit, whether it was stopped (with a checkpoint) or died (some steps are done again)."""
    composed, steps = config(*TINY, *small_corpus), len(column(whole, "batch/size"))
    choose = random.Random(seed)
    interruptions = sorted(choose.sample(range(1, steps), 2))
    for attempt, step in enumerate(interruptions, start=1):
        how = choose.choice(["stop", "crash"])
        run = train_until(composed, how, step, attempt)
        assert how == "crash" or steps_saved(run)[-1] == step
    train_here(composed, attempt=3)
    assert_same_record(run, whole)
    assert len(steps_saved(run)) == 2 and steps_saved(run)[-1] == steps


def test_a_decision_that_was_not_applied_yet_is_in_the_checkpoint(
    whole: RunDirectory, home: Path, small_corpus: list[str]
):
    composed, sizes = config(*TINY, *small_corpus), column(whole, "batch/size")
    for attempt, step in enumerate(changes(sizes)[:3], start=1):
        run = train_until(composed, "stop", step, attempt)
        saved = json.loads((run.complete_checkpoints()[-1] / "progress.json").read_text())
        assert saved["step"] == step and sizes[step - 1] != saved["next_batch"]["size"] == sizes[step]
    train_here(composed, attempt=4)
    assert_same_record(run, whole)


def interrupted_rank(rank: int, composed: Config, home: str) -> None:
    ranks = ranks_of(composed, rank)
    whole, run = RunDirectory(f"{home}/whole"), RunDirectory(f"{home}/cut")
    assert train(composed, whole, 1, ranks)
    dist.barrier()
    decided = changes(column(whole, "batch/size"))[1]
    with interruption("stop", decided):
        assert not train(composed, run, 1, ranks)
    assert steps_saved(run)[-1] == decided
    dist.barrier()
    run.clear_stop()
    dist.barrier()
    with interruption("crash", decided + 12), contextlib.suppress(Crash):
        train(composed, run, 2, ranks)
    dist.barrier()
    assert steps_saved(run)[-1] > decided
    if rank == 0:
        (run.complete_checkpoints()[-1] / "__1_0.distcp").unlink()
    dist.barrier()
    assert train(composed, run, 3, ranks)


def test_on_two_ranks_stopped_killed_and_with_a_shard_lost(
    home: Path, small_corpus: list[str], capfd: pytest.CaptureFixture[str]
):
    composed = config(*TINY, *small_corpus, "parallel=ddp")
    for name in ("whole", "cut"):
        RunDirectory(home / name).write_status(Status("RUNNING"))
    prepare(composed.data, home / "corpora", report=print)
    gloo_ranks(2, interrupted_rank, composed, str(home))
    assert_same_record(RunDirectory(home / "cut"), RunDirectory(home / "whole"))
    out = capfd.readouterr().out
    assert (
        len(re.findall(r"checkpoint at step \d+ is damaged: __1_0.distcp is missing; passed over", out)) == 1
    )
    assert len(re.findall(r"^stopped at step \d+, \d+ tokens, with a checkpoint$", out, re.M)) == 1


def test_a_stop_that_is_asked_for_before_the_first_step(home: Path, small_corpus: list[str]):
    composed = config(*TINY, *small_corpus)
    run = RunDirectory.of(composed)
    run.freeze(composed)
    run.request_stop()
    assert not train(composed, run, 1, ranks_of(composed))
    assert run.last_row() is None and steps_saved(run) == []


def test_a_stop_in_the_last_step_comes_too_late(home: Path, small_corpus: list[str]):
    composed = config(*TINY, *small_corpus, "batch=constant", "budget.tokens=1k", "lr.warmup_tokens=0")
    with interruption("stop", 4):
        run = train_here(composed)
    assert run.stop_requested() and column(run, "tokens")[-1] == 992 and column(run, "val/loss")


def test_checkpoints_by_time(home: Path, small_corpus: list[str], monkeypatch: pytest.MonkeyPatch):
    """On a clock that goes a minute per look: every save is due 20 looks after the one before."""
    saves: list[tuple[int, bool]] = []

    class Recorder(Checkpointer):
        def save(self, progress: Progress, wait: bool) -> None:
            saves.append((progress.step, wait))
            super().save(progress, wait)

    class Clock:
        minutes = 0.0

        def monotonic(self) -> float:
            self.minutes += 1.0
            return 60 * self.minutes

    monkeypatch.setattr(pipeline.train, "Checkpointer", Recorder)
    constant = [*TINY, *small_corpus, "batch=constant", "batch.size=16", "checkpoint.interval_tokens=null"]
    run = train_here(config(*constant))
    steps = len(column(run, "train/loss"))
    assert saves == [(steps, True)]
    run.path.rename(home / "first")
    saves.clear()
    monkeypatch.setattr(pipeline.stopping, "time", Clock())
    run = train_here(config(*constant, "checkpoint.interval_minutes=20"))
    assert saves[-1] == (steps, True) and 3 <= len(saves) <= 8
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(saves[:-1])]
    assert len(set(gaps)) == 1 and not any(wait for _, wait in saves[:-1])
    assert column(run, "train/loss") == column(RunDirectory(home / "first"), "train/loss")


# --- one checkpoint


class Small:
    """A model and its optimizer, after some steps, with checkpoints of their own."""

    def __init__(
        self, home: Path, seed: int = 0, ranks: Ranks | None = None, record: MetricsWriter | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for _ in range(3):
            self.model(torch.randn(4, 8)).square().sum().backward()
            self.optimizer.step()
        self.run = RunDirectory(home / "small")
        self.checkpoints = Checkpointer(
            self.run,
            ranks or ranks_of(config()),
            self.model,
            self.optimizer,
            {},
            record,
            {"model.width": 8},
            2,
        )

    def tensors(self) -> list[torch.Tensor]:
        state = self.optimizer.state.values()
        return [*self.model.parameters(), *(tensor for entry in state for tensor in entry.values())]

    def copy(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors()]


def progress(step: int) -> Progress:
    return Progress(State(8.0), Decision(8, 8.0, "held", {"test/statistic": 0.1}), 8, step, 10 * step, 1.5)


def hold_writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Checkpoints are written only when the event is set."""
    event = threading.Event()
    original = FileSystemWriter.write_data

    def wait_first(*arguments: object) -> object:
        assert event.wait(30)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_first)
    return event


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_what_is_written_is_what_was_there_at_the_call(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights, optimizer state and progress go on while the checkpoint is being written."""
    small, write = Small(home), hold_writing(monkeypatch)
    then, where = small.copy(), progress(5)
    small.checkpoints.save(where, wait=False)
    with torch.no_grad():
        for tensor in small.tensors():
            tensor.fill_(7)
    where.step, where.sequences = 6, 66
    assert not small.checkpoints.poll() and small.run.complete_checkpoints() == []
    write.set()
    small.checkpoints.settle()

    other = Small(home, seed=1)
    assert not same(other.copy(), then)
    assert other.checkpoints.restore() == progress(5)
    assert same(other.copy(), then)


def test_the_newest_two_are_kept_and_one_is_written_at_a_time(home: Path, monkeypatch: pytest.MonkeyPatch):
    small = Small(home)
    for step in range(1, 5):
        small.checkpoints.save(progress(step), wait=False)
        assert steps_saved(small.run) == list(range(max(1, step - 2), step))
    deadline = time.monotonic() + 30
    while not small.checkpoints.poll():
        assert time.monotonic() < deadline
    assert steps_saved(small.run) == [3, 4] and not small.checkpoints.poll()
    assert len(list(small.run.checkpoints.iterdir())) == 2

    write = hold_writing(monkeypatch)
    small.checkpoints.save(progress(5), wait=False)
    threading.Timer(0.3, write.set).start()
    small.checkpoints.save(progress(6), wait=True)
    assert steps_saved(small.run) == [5, 6]


def test_a_checkpoint_does_not_overtake_the_record(home: Path, capsys: pytest.CaptureFixture[str]):
    """Rows that are only in memory would be lost with the process, and no later attempt would do them."""

    class Stuck:
        def sync(self) -> None:
            raise OSError(28, "metrics.jsonl: 3 rows could not be written")

    small = Small(home)
    small.checkpoints.save(progress(1), wait=True)
    full = Small(home, record=Stuck()).checkpoints  # type: ignore[arg-type]
    full.save(progress(2), wait=False)
    full.settle()
    assert steps_saved(small.run) == [1] and len(list(small.run.checkpoints.iterdir())) == 1
    assert "checkpoint at step 2 could not be written: metrics.jsonl: 3 rows could" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"run it again: it goes on from step 1$"):
        full.save(progress(3), wait=True)


def test_a_power_cut_takes_the_record_only_with_the_checkpoint(home: Path, monkeypatch: pytest.MonkeyPatch):
    """On the disk before a checkpoint gets its name: its files, their names, the record. After it: the name."""
    synced: list[tuple[int, list[int]]] = []
    original = os.fsync

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_ino, steps_saved(small.run)))
        original(file)

    record = MetricsWriter(home / "small" / "metrics.jsonl")
    small = Small(home, record=record)
    small.checkpoints.save(progress(1), wait=True)
    record.write({"step": 2, "attempt": 1})
    monkeypatch.setattr(os, "fsync", fsync)
    small.checkpoints.save(progress(2), wait=True)
    record.close()
    path = small.run.complete_checkpoints()[-1]
    for file in (*path.iterdir(), path, small.run.metrics_file):
        assert (file.stat().st_ino, [1]) in synced, file.name
    assert (small.run.checkpoints.stat().st_ino, [1, 2]) in synced


@pytest.mark.parametrize("wait", [False, True])
def test_a_step_is_saved_once(wait: bool, home: Path, capsys: pytest.CaptureFixture[str]):
    """Not again by the same process, also while it is being written, nor by another that goes on there."""
    small = Small(home)
    small.checkpoints.save(progress(1), wait=wait)
    small.checkpoints.save(progress(1), wait=wait)
    small.checkpoints.settle()
    again = Small(home)
    assert again.checkpoints.restore() == progress(1)
    again.checkpoints.save(progress(1), wait=wait)
    again.checkpoints.settle()
    assert [path.name for path in small.run.checkpoints.iterdir()] == ["step-00000001"]
    assert "could not be written" not in capsys.readouterr().out


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path, data: st.DataObject):
    """In a shard, its index or progress.json. torch itself compares no checksum when it reads."""
    if not (tmp_path / "small").exists():
        Small(tmp_path).checkpoints.save(progress(1), wait=True)
    small = Small(tmp_path)
    (path,) = small.run.complete_checkpoints()
    file = path / data.draw(st.sampled_from(["__0_0.distcp", ".metadata", "progress.json"]))
    content = file.read_bytes()
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    try:
        if checkpoint.damage(path) is None:
            before = small.copy()
            with torch.no_grad():
                for tensor in small.tensors():
                    tensor.zero_()
            with contextlib.suppress(CheckpointError):  # torch noticed, as it cannot find its way
                assert small.checkpoints.restore() == progress(1) and same(small.copy(), before)
    finally:
        file.write_bytes(content)


# --- damaged checkpoints


def edit_progress(path: Path, **changes: object) -> None:
    file = path / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_progress(path: Path, **changes: object) -> None:
    """With its checksum: as another version may have written it."""
    tree = json.loads((path / "progress.json").read_text()) | changes
    del tree["crc32"]
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    edit_progress(path, **changes, crc32=zlib.crc32(canonical.encode()))


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of_before(path: Path, name: str) -> None:
    shutil.copyfile(min(path.parent.glob("step-*")) / name, path / name)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "shard truncated": (lambda path: truncate(path / "__0_0.distcp"), r"__0_0.distcp has \d+ of \d+ bytes"),
    "bit flipped": (lambda path: flip(path / "__0_0.distcp", 0.5), r"in __0_0.distcp is not what was writ"),
    "shard of another step": (
        lambda path: of_before(path, "__0_0.distcp"),
        r"in __0_0.distcp is not what was w",
    ),
    "progress of another step": (lambda path: of_before(path, "progress.json"), r"is not what was written"),
    "index missing": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "index changed": (lambda path: flip(path / ".metadata", 0.5), ".metadata is not what was written"),
    "progress torn": (lambda path: truncate(path / "progress.json"), "progress.json is unreadable"),
    "progress changed": (lambda path: edit_progress(path, sequences=37), "progress.json is not what was wr"),
    "progress of something else": (
        lambda path: (path / "progress.json").write_text("[1]"),
        "progress.json is",
    ),
}


def entries_of(path: Path) -> list[Any]:
    """Where in which file each tensor lies, in the order in which ranks share them out."""
    return list(pickle.loads((path / ".metadata").read_bytes()).storage_data.values())


def test_each_tensor_is_looked_at_by_one_rank(home: Path):
    small = Small(home)
    small.checkpoints.save(progress(1), wait=True)
    (path,) = small.run.complete_checkpoints()
    shard = path / "__0_0.distcp"
    content = shard.read_bytes()
    assert len(entries_of(path)) > 3
    for entry in entries_of(path):
        shard.write_bytes(content[: entry.offset] + b"?" + content[entry.offset + 1 :])
        assert [checkpoint.damage(path, share, 3) for share in range(3)].count(None) == 2
    shard.write_bytes(content)
    assert [checkpoint.damage(path, share, 3) for share in range(3)].count(None) == 3


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: str,
    cut: RunDirectory,
    whole: RunDirectory,
    home: Path,
    small_corpus: list[str],
    capsys: pytest.CaptureFixture[str],
):
    composed = config(*TINY, *small_corpus)
    run = copy_of(cut, composed)
    before, newest = steps_saved(run)
    do_damage, reason = DAMAGE[kind]
    do_damage(run.complete_checkpoints()[-1])
    train_here(composed, attempt=2)
    out = capsys.readouterr().out
    assert re.search(
        rf"^checkpoint at step 35 is damaged: .*{reason}.*; passed over, now torn-0*35$", out, re.M
    )
    assert f"resumed at step {before}, " in out and newest == 35
    assert_same_record(run, whole)
    assert not list(run.checkpoints.glob("torn-*"))
    assert checkpoint.load_weights(run)


def test_a_damaged_checkpoint_goes_when_the_next_is_saved(home: Path):
    small = Small(home)
    for step in (1, 2):
        small.checkpoints.save(progress(step), wait=True)
    truncate(small.run.complete_checkpoints()[-1] / "progress.json")
    assert small.checkpoints.restore() == progress(1)
    assert small.checkpoints.restore() == progress(1)
    names = ["step-00000001", "torn-00000002"]
    assert sorted(path.name for path in small.run.checkpoints.iterdir()) == names
    small.checkpoints.save(progress(2), wait=True)
    assert sorted(path.name for path in small.run.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def restoring_rank(rank: int, home: str, prepared: str) -> tuple[object, list[int]]:
    """What a rank restores after two checkpoints, and the steps that are left. `prepared` names what happens
    in between."""
    ranks = ranks_of(config("parallel=ddp"), rank)
    small = Small(Path(home), ranks=ranks)
    for step in (1, 2):
        small.checkpoints.save(progress(step), wait=True)
        small.checkpoints.save(progress(step), wait=True)
    dist.barrier()
    globals()[prepared](rank, small.run.complete_checkpoints()[-1])
    dist.barrier()
    try:
        restored: object = small.checkpoints.restore()
    except (CheckpointError, ConfigError) as error:
        restored = str(error)
    dist.barrier()
    return restored, steps_saved(small.run)


def flip_in_the_share_of_rank_1(rank: int, path: Path) -> None:
    if rank == 0:
        entry = entries_of(path)[1]
        shard = path / entry.relative_path
        content = bytearray(shard.read_bytes())
        content[entry.offset] ^= 1
        shard.write_bytes(content)
        assert checkpoint.damage(path, 0, 2) is None and checkpoint.damage(path, 1, 2)


def stale_checksums_on_rank_1(rank: int, path: Path) -> None:
    def stale(*_: object) -> bool:
        raise OSError(116, "Stale file handle")

    if rank == 1:
        checkpoint._is_corrupt = stale


def stale_reader_on_rank_1(rank: int, path: Path) -> None:
    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    if rank == 1:
        FileSystemReader.read_data = stale  # type: ignore[method-assign, assignment]


def test_a_bit_that_one_of_two_ranks_finds_flipped_is_found_by_both(home: Path):
    restored = gloo_ranks(2, restoring_rank, str(home), "flip_in_the_share_of_rank_1", timeout_s=60)
    assert restored == [(progress(1), [1]), (progress(1), [1])]


@pytest.mark.parametrize("prepared", ["stale_checksums_on_rank_1", "stale_reader_on_rank_1"])
def test_a_disk_that_one_of_two_ranks_cannot_read_ends_both(prepared: str, home: Path):
    restored = gloo_ranks(2, restoring_rank, str(home), prepared, timeout_s=60)
    assert restored[0] == restored[1]
    message, steps = restored[0]
    assert re.fullmatch(
        r".*/step-00000002: cannot be read by rank 1 \(Stale file handle\): nothing was changed; mend that, "
        r"then run it again",
        message,
    )
    assert steps == [1, 2]


@pytest.mark.parametrize("name", ["progress.json", ".metadata", "__0_0.distcp"])
def test_a_file_that_cannot_be_read_is_not_damage(name: str, home: Path):
    small = Small(home)
    for step in (1, 2):
        small.checkpoints.save(progress(step), wait=True)
    file = small.run.complete_checkpoints()[-1] / name
    file.rename(home / "kept")
    file.symlink_to(file)
    message = rf"{file}: cannot be read.* \(Too many levels of symbolic links\): nothing was changed; mend"
    with pytest.raises(CheckpointError, match=message):
        small.checkpoints.restore()
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_weights(small.run)
    file.unlink()
    (home / "kept").rename(file)
    assert small.checkpoints.restore() == progress(2)


def test_a_failure_while_loading_whole_files_is_not_damage(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Memory may run out for a moment; the newest checkpoint must survive that."""
    small = Small(home)
    for step in (1, 2):
        small.checkpoints.save(progress(step), wait=True)

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemReader, "read_data", fail)
        with pytest.raises(
            CheckpointError, match=r"step-00000002: cannot be read by rank 0 \(.*out of memory"
        ):
            small.checkpoints.restore()
    assert steps_saved(small.run) == [1, 2]
    assert small.checkpoints.restore() == progress(2)


def test_a_copy_beside_the_checkpoints_is_none_of_them(home: Path):
    small = Small(home)
    small.checkpoints.save(progress(1), wait=True)
    (first,) = small.run.complete_checkpoints()
    copy = shutil.copytree(first, first.with_name(f"{first.name}-keep"))
    for step in (2, 3):
        small.checkpoints.save(progress(step), wait=True)
    assert steps_saved(small.run) == [2, 3] and copy.exists()
    assert small.checkpoints.restore() == progress(3)


def test_a_directory_that_cannot_be_read_is_not_an_empty_one(home: Path):
    small = Small(home)
    small.run.path.mkdir()
    small.run.checkpoints.symlink_to(small.run.checkpoints)
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read by rank 0 .*nothing was changed"):
        small.checkpoints.restore()


@pytest.mark.parametrize("pickled", [b"cno.such.module\nThing\n.", b"ctorch\nNoSuchThing\n."])
def test_an_index_that_this_torch_cannot_read_is_not_damage(pickled: bytes, home: Path):
    small = Small(home)
    for step in (1, 2):
        small.checkpoints.save(progress(step), wait=True)
    newest = small.run.complete_checkpoints()[-1]
    (newest / ".metadata").write_bytes(pickled)
    write_progress(newest, metadata_crc32=zlib.crc32(pickled), torch="9.9")
    for read in (small.checkpoints.restore, lambda: checkpoint.load_weights(small.run)):
        with pytest.raises(
            ConfigError, match=r"cannot read what torch 9.9 wrote \(.*\). Go on with that vers"
        ):
            read()
    assert steps_saved(small.run) == [1, 2]


def by_getattr(what: object, name: str) -> bytes:
    """A pickle that asks for an attribute."""

    class Asking:
        def __reduce__(self) -> tuple[object, ...]:
            return getattr, (what, name)

    return pickle.dumps(Asking())


def test_an_index_that_python_3_11_2_wrote_is_read(monkeypatch: pytest.MonkeyPatch):
    """It names the members of enumerations by getattr, with which other pickles could reach any code."""
    format = TensorProperties(torch.float32).memory_format
    monkeypatch.setattr(
        type(_MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT),
        "__reduce_ex__",
        lambda self, protocol: (getattr, (type(self), self.name)),
    )
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2]), [])
    written = pickle.dumps(Metadata({"w": tensor}, storage_data={}))
    assert b"getattr" in written
    found = index_of(written).state_dict_metadata["w"]
    assert isinstance(found, TensorStorageMetadata) and found.properties.memory_format is format
    for what in (Metadata, "text"):
        with pytest.raises(pickle.UnpicklingError, match="has no place in an index"):
            index_of(by_getattr(what, "__doc__"))


def test_an_index_that_python_3_13_wrote_is_read():
    """It has another name for the class of paths."""
    path = Path("/runs/1/checkpoints/partial-00000001")
    index = Metadata({}, storage_data={}, storage_meta=StorageMeta(checkpoint_id=path))
    data = pickle.dumps(index, protocol=3)  # names as lines of text
    written = data if b"pathlib._local" in data else data.replace(b"cpathlib\n", b"cpathlib._local\n")
    assert b"pathlib._local" in written
    meta = index_of(written).storage_meta
    assert meta is not None and meta.checkpoint_id == path


def test_when_every_checkpoint_is_damaged_nothing_is_begun_anew(
    cut: RunDirectory, home: Path, small_corpus: list[str]
):
    composed = config(*TINY, *small_corpus)
    run = copy_of(cut, composed)
    before, _ = run.complete_checkpoints()
    for path in run.complete_checkpoints():
        (path / ".metadata").rename(path / "elsewhere")
    rows = run.metrics_file.read_bytes()
    message = r"no checkpoint can be loaded \(step 35: .metadata is missing; step \d+: .metadata is missing\)"
    with pytest.raises(CheckpointError, match=message + r".* delete this directory"):
        train_here(composed, attempt=2)
    assert run.metrics_file.read_bytes() == rows
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        checkpoint.load_weights(run)
    (before / "elsewhere").rename(before / ".metadata")
    train_here(composed, attempt=3)


def test_weights_are_read_from_the_newest_whole_one(home: Path, capsys: pytest.CaptureFixture[str]):
    small = Small(home)
    small.checkpoints.save(progress(1), wait=True)
    before = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    small.optimizer.step()
    small.checkpoints.save(progress(2), wait=True)
    (small.run.complete_checkpoints()[-1] / "__0_0.distcp").unlink()
    read = checkpoint.load_weights(small.run)
    assert read.keys() == before.keys() and same(list(read.values()), list(before.values()))
    assert "step 2 is damaged: __0_0.distcp is missing; an older one is read" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(cut: RunDirectory, home: Path, small_corpus: list[str]):
    """Also where its parameters have the same names and shapes. What a model is called does not matter."""
    for changes, difference in {
        ("model.width=64",): "model.width is 32 there and 64 here",
        ("model.heads=1", "model.kv_heads=1"): "model.heads is 2 there and 1 here, model.kv_heads is 2 there",
        ("model.rope_theta=500000",): "model.rope_theta is 10000.0 there and 500000.0 here",
        ("model.norm_eps=1e-6",): "model.norm_eps is 1e-05 there and 1e-06 here",
    }.items():
        other = config(*TINY, *small_corpus, *changes)
        run = copy_of(cut, other)
        with pytest.raises(ConfigError, match=f"of another model: {difference}.* Go on with the model"):
            train_here(other, attempt=2)
        assert steps_saved(run)[-1] == 35
    renamed = config(*TINY, *small_corpus, "model.name=mine")
    run = copy_of(cut, renamed)
    train_here(renamed, attempt=2)
    assert steps_saved(run)[-1] > 35
    small = Small(home)
    small.checkpoints.save(progress(1), wait=True)
    without = Checkpointer(small.run, ranks_of(config()), small.model, small.optimizer, {}, None, {}, 2)
    with pytest.raises(ConfigError, match=r"of another model: model.width is 8 there and absent here\. Go"):
        without.restore()


@pytest.mark.parametrize("schema", [0, 1, 7])
def test_a_checkpoint_of_another_schema_is_refused(
    schema: int, cut: RunDirectory, home: Path, small_corpus: list[str]
):
    composed = config(*TINY, *small_corpus)
    run = copy_of(cut, composed)
    newest = run.complete_checkpoints()[-1]
    write_progress(newest, schema=schema)
    if schema == 1:
        tree = json.loads((newest / "progress.json").read_text())
        del tree["crc32"]
        (newest / "progress.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=f"its schema is {schema}, this version reads 3. Go on with"):
        train_here(composed, attempt=2)
    assert steps_saved(run)[-1] == 35


# --- a full disk, a sudden end


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_a_checkpoint(
    small_disk: Path, whole: RunDirectory, small_corpus: list[str], capsys, monkeypatch: pytest.MonkeyPatch
):
    """First there is no room for a checkpoint, then for nothing at all, then there is again."""
    saved: dict[int, list[int]] = {}

    class Ballast(pipeline.train.Trainer):
        def step(self) -> None:
            match self.progress.step:
                case 20:
                    self.checkpoints.settle()
                    fill(small_disk, leave=300_000)
                case 35:
                    self.checkpoints.settle()
                    fill(small_disk, leave=0)
                case 45:
                    rows = self.run.rows()
                    assert rows[-1]["step"] < 45 and self.progress.step == 45
                    (small_disk / "ballast").unlink()
            super().step()
            saved[self.progress.step] = steps_saved(self.run)

    monkeypatch.setattr(pipeline.train, "Trainer", Ballast)
    monkeypatch.setattr(pipeline.record, "STATUS_INTERVAL_S", 0.0)
    run = train_here(config(*TINY, *small_corpus))
    assert_same_record(run, whole)
    out = capsys.readouterr().out
    (first,) = saved[20]
    assert saved[45] == [first] and len(steps_saved(run)) == 2 and first not in steps_saved(run)
    lost = re.findall(
        r"^checkpoint at step (\d+) could not be written: rank 0: No space left on device; "
        rf"the run goes on, the newest checkpoint is step {first}$",
        out,
        re.M,
    )
    assert lost and all(20 < int(step) <= 50 for step in lost)
    assert len(re.findall(r"metrics.jsonl: 1 rows could not be written .*the run goes on", out)) == 1
    assert len(list(run.checkpoints.iterdir())) == 2
    assert not list(run.path.glob(".*")), "temporary files are left"


def test_without_room_for_the_last_checkpoint_the_run_fails_and_goes_on_later(
    small_disk: Path, small_corpus: list[str]
):
    """Two ranks with a supervisor. There is room for one checkpoint."""
    composed = config(*TINY, *small_corpus, "parallel=ddp", "checkpoint.interval_tokens=12k")
    run = frozen(composed)
    prepare(composed.data, small_disk / "corpora", report=print)
    fill(small_disk, leave=1_000_000)
    worker = start(run)
    output, _ = worker.communicate(timeout=90)
    status, (saved,) = run.status(), steps_saved(run)
    assert (worker.returncode, status.state) == (1, "FAILED"), output
    assert re.fullmatch(
        r"rank [01]: CheckpointError: the checkpoint at step \d+, the last of this attempt, could not be "
        r"written: rank \d: No space left on device. Mend that \(on a full disk: free space\), then run it "
        rf"again: it goes on from step {saved}",
        status.error,
    )
    assert len(list(run.checkpoints.iterdir())) == 1
    (small_disk / "ballast").unlink()
    again = start(run)
    output, _ = again.communicate(timeout=90)
    assert (again.returncode, run.status().state) == (0, "DONE"), output
    assert min(row["step"] for row in run.rows() if row["attempt"] == 2) == saved + 1
    assert column(run, "tokens")[-1] == composed.budget_tokens and math.isfinite(column(run, "val/loss")[-1])


def train_and_hang_while_saving(composed: Config, path: str) -> None:
    """Hangs in the second checkpoint, its bytes half written."""
    run, original = RunDirectory(path), FileSystemWriter.write_data

    def write(*arguments: object) -> object:
        done = original(*arguments)  # type: ignore[arg-type]
        if run.complete_checkpoints():
            truncate(next(run.checkpoints.glob("partial-*")) / "__0_0.distcp")
            (run.path / "hanging").touch()
            time.sleep(600)
        return done

    FileSystemWriter.write_data = write  # type: ignore[method-assign, assignment]
    train(composed, run, 1, ranks_of(composed))


def test_killed_while_a_checkpoint_is_written(
    whole: RunDirectory, home: Path, small_corpus: list[str], capsys: pytest.CaptureFixture[str]
):
    composed = config(*TINY, *small_corpus)
    run = frozen(composed)
    victim = multiprocessing.get_context("spawn").Process(
        target=train_and_hang_while_saving, args=(composed, str(run.path))
    )
    victim.start()
    deadline = time.monotonic() + 60
    while not (run.path / "hanging").exists():
        assert victim.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    victim.join()
    (saved,) = steps_saved(run)
    assert list(run.checkpoints.glob("partial-*"))
    (run.checkpoints / "partial-99999999").mkdir()  # of a step that is not saved again
    train_here(composed, attempt=2)
    assert f"resumed at step {saved}, " in capsys.readouterr().out
    assert_same_record(run, whole)
    assert not list(run.checkpoints.glob("partial-*"))
