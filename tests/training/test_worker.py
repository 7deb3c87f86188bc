"""The supervisor: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.store import RunDirectory, read_rows
from tests.distributed import column, train_here
from tests.support import config

pytestmark = pytest.mark.slow
TINY = [
    "data.sequence_length=64",
    "batch.size=16",
    "lr.warmup_tokens=5k",
    "eval.sequences=16",
    "parallel=ddp",
]


def start(run: RunDirectory, *changes: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.worker", str(run.path), *changes],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def frozen(composed: Config) -> RunDirectory:
    run = RunDirectory.of(composed)
    run.freeze(composed)
    return run


def wait_for_step(run: RunDirectory, step: int, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while (row := run.last_row()) is None or row["step"] < step:
        assert time.monotonic() < deadline, f"step {step} not reached: {run.status()}"
        time.sleep(0.02)


def processes_of(run: RunDirectory) -> dict[int, str]:
    """Live processes whose command line names the run: pid -> RANK, or "" for the supervisor."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(run.path) in (path / "cmdline").read_text()
                and (path / "stat").read_text().split()[2] != "Z"
            ):
                variables = dict(
                    v.split("=", 1) for v in (path / "environ").read_text().split("\0") if "=" in v
                )
                found[int(path.name)] = variables.get("RANK", "")
        except (OSError, IndexError):
            continue  # it ended while we looked
    return found


def wait_until_gone(run: RunDirectory, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while processes_of(run):
        assert time.monotonic() < deadline, processes_of(run)
        time.sleep(0.05)


def assert_nothing_torn(run: RunDirectory) -> None:
    assert json.loads(run.status_file.read_text())["state"]
    assert run.metrics_file.read_bytes().endswith(b"\n")
    assert len(read_rows(run.metrics_file)) == run.metrics_file.read_bytes().count(b"\n")
    assert not list(run.path.glob(".*")), "temporary files are left"


def test_killed_rank_fails_the_run_and_the_same_command_finishes_it(home: Path, small_corpus: list[str]):
    composed = config(*TINY, *small_corpus, "budget.tokens=200k", "checkpoint.interval_tokens=25k")
    run = frozen(composed)
    worker = start(run)
    wait_for_step(run, 40)
    (victim,) = [pid for pid, rank in processes_of(run).items() if rank == "1"]
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    output, _ = worker.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert worker.returncode == 1, output
    status = run.status()
    assert status.state == "FAILED" and status.exit_code == 1
    assert status.error.startswith("rank 1 was killed by SIGKILL (signal 9) after step"), status.error
    assert processes_of(run) == {}
    assert_nothing_torn(run)

    second = start(run)
    concurrent = start(run)
    outputs = [process.communicate(timeout=180)[0] for process in (second, concurrent)]
    assert [second.returncode, concurrent.returncode] == [0, 0], outputs
    assert sum("is being run by process" in output for output in outputs) == 1, outputs
    assert (run.status().state, run.status().attempt, run.status().error) == ("DONE", 2, None)
    assert column(run, "step")[0] == 1 and column(run, "tokens")[-1] == composed.budget_tokens
    first_redone = min(row["step"] for row in run.rows() if row["attempt"] == 2)
    assert first_redone > 20  # it went on from a checkpoint
    assert_nothing_torn(run)

    run.path.rename(home / "killed")
    uninterrupted = train_here(composed)
    assert column(RunDirectory(home / "killed"), "train/loss") == column(uninterrupted, "train/loss")


def test_killed_supervisor_takes_its_ranks_with_it_and_leaves_the_run_free(
    home: Path, small_corpus: list[str]
):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=6M"))
    worker = start(run)
    wait_for_step(run, 3)
    assert sorted(processes_of(run).values()) == ["", "0", "1"]
    worker.kill()
    worker.wait()
    wait_until_gone(run, timeout_s=10)
    assert not run.is_locked()


def test_supervisor_killed_while_its_ranks_start_leaves_none(home: Path, small_corpus: list[str]):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=6M"))
    worker = start(run)
    deadline = time.monotonic() + 60
    while len(processes_of(run)) < 2:  # the first rank has just been started
        assert time.monotonic() < deadline
    worker.kill()
    worker.wait()
    wait_until_gone(run, timeout_s=20)


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.5, 1.5])
def test_stop_signal_while_starting_is_recorded_as_cancelled(
    delay_s: float, home: Path, small_corpus: list[str]
):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=6M"))
    worker = start(run)
    deadline = time.monotonic() + 60
    while run.status().state != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay_s)
    worker.terminate()
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 128 + signal.SIGTERM, output
    assert run.status().state == "CANCELLED" and processes_of(run) == {}
    assert "Traceback" not in output


def test_what_goes_wrong_before_the_ranks_start_is_recorded(home: Path, small_corpus: list[str]):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=50k"))
    (home / "corpora").write_text("no directory")
    worker = start(run)
    output, _ = worker.communicate(timeout=60)
    status = run.status()
    assert (worker.returncode, status.state, status.exit_code) == (1, "FAILED", 1), output
    assert "corpora" in status.error and "\n" not in status.error and not run.is_locked()


def test_a_foreign_launcher_is_refused(home: Path, small_corpus: list[str]):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=50k"))
    worker = start(run, RANK="0")
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 2 and "start the worker plainly" in output
    assert run.status().state == "PENDING"


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(home: Path, small_corpus: list[str]):
    """With a checkpoint at the step where it stopped, though none was due."""
    composed = config(*TINY, *small_corpus, "budget.tokens=200k", "batch=norm_test", "batch.max_size=64")
    run = frozen(composed)
    worker = start(run)
    wait_for_step(run, 20)
    worker.terminate()
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 128 + signal.SIGTERM, output
    assert output.count("stopping at the next step, with a checkpoint; once more to stop at once") == 1
    status, row = run.status(), run.last_row()
    assert (status.state, status.error) == ("CANCELLED", "stopped by SIGTERM")
    assert run.complete_checkpoints()[-1].name == f"step-{row['step']:08d}"
    assert row["step"] >= 20 and row["tokens"] < composed.budget_tokens
    log = (run.logs / "attempt-1.rank-0.log").read_text()
    assert f"stopped at step {row['step']}, {row['tokens']} tokens, with a checkpoint" in log
    assert processes_of(run) == {} and not run.stop_requested()
    assert_nothing_torn(run)

    run.request_stop()  # left by something that died; the next attempt is not meant
    worker = start(run)
    output, _ = worker.communicate(timeout=90)
    assert (worker.returncode, run.status().state) == (0, "DONE"), output
    assert [row["step"] for row in read_rows(run.metrics_file)] == sorted(column(run, "step"))  # none twice

    run.path.rename(home / "stopped")
    uninterrupted = train_here(composed)
    for name in ("tokens", "batch/size", "lr", "train/loss", "val/loss"):
        assert column(RunDirectory(home / "stopped"), name) == column(uninterrupted, name)


def test_a_stopped_run_goes_on_on_another_mesh(home: Path, small_corpus: list[str]):
    """The same run: one record, the same steps, and the mesh of the attempt in its status."""
    composed = config(*TINY, *small_corpus, "budget.tokens=100k", "parallel=single")
    run = frozen(composed)
    worker = start(run)
    wait_for_step(run, 10)
    worker.terminate()
    worker.communicate(timeout=60)
    assert (run.status().state, run.status().mesh) == ("CANCELLED", "single")
    stopped_at = run.last_row()["step"]

    refused = start(run, "batch.size=8")
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "batch.size=8: an attempt can change parallel=…" in output
    worker = start(run, "parallel=fsdp")
    output, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0 and "attempt 2 on fsdp, shard 2" in output, output
    assert (run.status().state, run.status().mesh) == ("DONE", "fsdp, shard 2")
    run.path.rename(home / "moved")
    moved, whole = RunDirectory(home / "moved"), train_here(composed)
    assert {row["attempt"] for row in moved.rows() if row["step"] > stopped_at} == {2}
    assert column(moved, "tokens") == column(whole, "tokens")
    assert column(moved, "train/loss") == pytest.approx(column(whole, "train/loss"), rel=1e-3)


@contextlib.contextmanager
def asked_to_stop_with_a_hung_rank(
    run: RunDirectory, number: signal.Signals, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A worker whose rank 1 (the process id) is frozen, so that no step ends any more, and that has just
    acknowledged a signal."""
    worker = start(run, **environment)
    try:
        wait_for_step(run, 3)
        (pid,) = [pid for pid, rank in processes_of(run).items() if rank == "1"]
        os.kill(pid, signal.SIGSTOP)
        worker.send_signal(number)
        assert worker.stdout
        while "stopping at the next step" not in worker.stdout.readline():
            assert worker.poll() is None
        yield worker, pid
    finally:
        worker.kill()  # its ranks die with it


@pytest.mark.parametrize("how", ["second signal", "grace period"])
def test_a_hung_rank_holds_a_stop_until_the_second_signal_or_the_end_of_the_grace_period(
    how: str, home: Path, small_corpus: list[str]
):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=6M"))
    grace = "2" if how == "grace period" else "60"
    with asked_to_stop_with_a_hung_rank(run, signal.SIGINT, CRESCENDO_STOP_GRACE_S=grace) as (worker, _):
        asked = time.monotonic()
        if how == "second signal":
            worker.terminate()
        output, _ = worker.communicate(timeout=30)  # long before the 60 s of grace
        assert time.monotonic() - asked > (2 if how == "grace period" else 0)
    assert worker.returncode == 128 + signal.SIGINT and "Traceback" not in output
    late = "; no checkpoint within 2 s" if how == "grace period" else ""
    assert (run.status().state, run.status().error) == ("CANCELLED", f"stopped by SIGINT{late}")
    assert processes_of(run) == {} and not run.stop_requested() and run.complete_checkpoints() == []


def test_a_signal_to_every_process_of_the_job_is_one_stop(home: Path, small_corpus: list[str]):
    """As schedulers send it: the ranks live on to the next step and save, whoever of them is told first."""
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=6M"))
    worker = start(run)
    wait_for_step(run, 3)
    for pid in processes_of(run):  # the supervisor is one of them
        os.kill(pid, signal.SIGTERM)
    output, _ = worker.communicate(timeout=60)
    assert (worker.returncode, run.status().state) == (128 + signal.SIGTERM, "CANCELLED"), output
    (saved,) = run.complete_checkpoints()
    assert saved.name == f"step-{run.last_row()['step']:08d}"
    assert processes_of(run) == {}


def test_a_rank_killed_while_stopping_fails_the_attempt(home: Path, small_corpus: list[str]):
    run = frozen(config(*TINY, *small_corpus, "budget.tokens=6M"))
    with asked_to_stop_with_a_hung_rank(run, signal.SIGHUP) as (worker, hung):
        os.kill(hung, signal.SIGKILL)
        worker.communicate(timeout=30)
    assert (worker.returncode, run.status().state) == (1, "FAILED")
    assert run.status().error.startswith("rank 1 was killed by SIGKILL (signal 9) after step")
    assert processes_of(run) == {} and not run.stop_requested()


def test_failure_inside_a_rank_is_reported_in_one_line(home: Path, small_corpus: list[str]):
    overrides = [
        "budget.tokens=50k",
        "optim.lr=1e18",
        "optim.clip=null",
        "lr.warmup_tokens=0",
        "parallel=single",
    ]
    run = frozen(config(*TINY, *small_corpus, *overrides))
    worker = start(run)
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert run.status().state == "FAILED"
    assert run.status().error.startswith("rank 0: Diverged: step ")
    assert run.status().diverged
    assert "Traceback" in (run.logs / "attempt-1.rank-0.log").read_text()
    assert run.status().error in output


def test_a_wrong_directory_is_refused(home: Path):
    worker = start(RunDirectory(home / "nothing"))
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 2
    assert "holds no config.yaml" in output and "Traceback" not in output


def inspected(file: Path) -> str:
    """What wandb's own reader finds in an offline file."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize("mode", ["offline", "broken"])
def test_wandb_mirrors_the_record_and_cannot_stop_it(
    mode: str, home: Path, small_corpus: list[str], monkeypatch
):
    monkeypatch.delenv("WANDB_MODE")
    composed = config(*TINY, *small_corpus, "parallel=single", "budget.tokens=25k", "track.every=5")
    run = frozen(composed)
    if mode == "broken":  # a file where the directory should be
        (run.path / "wandb").write_text("")
    worker = start(run)
    output, _ = worker.communicate(timeout=90)
    assert worker.returncode == 0, output
    assert run.status().state == "DONE" and len(column(run, "train/loss")) == 25
    log = (run.logs / "attempt-1.rank-0.log").read_text()
    if mode == "broken":
        assert "metrics.jsonl is complete" in log
        return
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{run.id}-a1.wandb"
    assert "WARNING" not in log
    text = inspected(file)
    assert text.count("throughput/tokens_per_s") >= 6 and "val/loss" in text and "batch.schedule" in text


@pytest.mark.parametrize("wish", ["PREEMPTED", "CANCELLED"])
def test_wandb_is_told_of_a_run_that_will_go_on(wish: str, home: Path, small_corpus: list[str], monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    run = frozen(config(*TINY, *small_corpus, "parallel=single", "budget.tokens=6M", "track.every=1"))
    worker = start(run)
    while not list(run.path.glob("wandb/offline-run-*/*.wandb")):
        assert worker.poll() is None, worker.communicate()[0]
        time.sleep(0.05)
    run.request_stop(wish)  # type: ignore[arg-type]
    output, _ = worker.communicate(timeout=90)
    assert run.status().state == "CANCELLED", output  # of this attempt, which nobody queues again
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    assert ('"type":"preempting"' in inspected(file)) == (wish == "PREEMPTED")


def test_silent_wandb_does_not_stop_training(home: Path, small_corpus: list[str], monkeypatch):
    """Its service is stopped in its tracks: nothing answers, nothing fails, and the run goes on."""
    monkeypatch.delenv("WANDB_MODE")
    run = frozen(config(*TINY, *small_corpus, "parallel=single", "budget.tokens=6M", "track.every=1"))
    worker = start(run)
    service = None
    try:
        while not list(run.path.glob("wandb/offline-run-*/*.wandb")):  # until then its start is what fails
            assert worker.poll() is None
            time.sleep(0.05)
        wait_for_step(run, run.last_row()["step"] + 50)
        while (service := wandb_service(home)) is None:
            assert worker.poll() is None
        os.kill(service, signal.SIGSTOP)
        stopped_at = run.last_row()["step"]
        # Far more rows than all buffers between them hold.
        wait_for_step(run, stopped_at + 1000, timeout_s=300)
    finally:
        if service:  # else the rank would wait for it before it ends
            with contextlib.suppress(ProcessLookupError):
                os.kill(service, signal.SIGKILL)
        worker.terminate()
        worker.communicate(timeout=60)
    assert "misses rows" in (run.logs / "attempt-1.rank-0.log").read_text()


def wandb_service(home: Path) -> int | None:
    """The process of wandb that serves the runs of this home."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if "wandb-core" in (path / "cmdline").read_text() and str(home) in (path / "environ").read_text():
                return int(path.name)
    return None
