"""The state of a run from its files and the scheduler's queue, case by case."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from launchers.state import QueuedJob, RunState, run_state
from pipeline.store import RunDirectory, State, Status

JOB = "12_3"
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "REQUEUE_FED",
    "RESV_DEL_HOLD",
)

# Of a run whose job is: not in the queue, waiting there, running there, nobody knows (no scheduler to ask).
WITH_JOB: dict[State, tuple[RunState, RunState, RunState, RunState]] = {
    # Submitted. A job that left the queue before it started had no part in the run.
    "PENDING": ("new", "queued", "running", "queued"),
    # Gone without a word: lost. Waiting again: its node died, and SLURM has queued it once more.
    "RUNNING": ("lost", "queued", "running", "running"),
    "DONE": ("done", "done", "done", "done"),
    # While others share the job, or it is just ending.
    "FAILED": ("failed", "queued", "failed", "failed"),
    "CANCELLED": ("cancelled", "cancelled", "cancelled", "cancelled"),
    # Its job queues itself again, or has been started again and has not come to the run yet.
    "PREEMPTED": ("preempted", "queued", "queued", "preempted"),
}
# Of a run that no job has: nobody is at it, somebody holds its lock.
WITHOUT_JOB: dict[State, tuple[RunState, RunState]] = {
    "PENDING": ("new", "running"),
    "RUNNING": ("lost", "running"),
    "DONE": ("done", "done"),
    "FAILED": ("failed", "running"),
    "CANCELLED": ("cancelled", "running"),
    "PREEMPTED": ("preempted", "running"),
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = tmp_path / "0123456789"
    directory.mkdir()
    (directory / "config.yaml").write_text("")
    return RunDirectory(directory)


def test_a_run_that_was_deleted_is_new(tmp_path: Path) -> None:
    """Its processes, not told yet, may still write a status."""
    run = RunDirectory(tmp_path / "0123456789")
    run.write_status(Status("RUNNING", job=JOB))
    assert run_state(run, run.status(), {JOB: QueuedJob("RUNNING")}) == "new"


@pytest.mark.parametrize("state", WITH_JOB)
def test_with_a_job(run: RunDirectory, state: State) -> None:
    status = Status(state, attempt=1, job=JOB)
    gone, waiting, running, unknown = WITH_JOB[state]
    others = {"12_4": QueuedJob("RUNNING"), "12": QueuedJob("PENDING")}
    assert run_state(run, status, {}) == run_state(run, status, others) == gone
    assert {run_state(run, status, others | {JOB: QueuedJob(word)}) for word in WAITING} == {waiting}
    assert {run_state(run, status, others | {JOB: QueuedJob(word)}) for word in RUNNING} == {running}
    assert run_state(run, status, None) == unknown


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("state", WITHOUT_JOB)
def test_without_a_job(run: RunDirectory, state: State, asked: bool) -> None:
    queue = {JOB: QueuedJob("RUNNING")} if asked else None
    status = Status(state, attempt=1)
    free, held = WITHOUT_JOB[state]
    assert run_state(run, status, queue) == free
    with run.lock():
        assert run_state(run, status, queue) == held
    assert run_state(run, status, queue) == free


@pytest.mark.parametrize("locked", [True, False])
def test_with_a_job_that_left_the_queue_and_a_lock(run: RunDirectory, locked: bool) -> None:
    """Whoever holds the lock is at the run, whatever its last job was."""
    with run.lock() if locked else contextlib.nullcontext():
        assert run_state(run, Status("FAILED", 1, job=JOB), {}) == ("running" if locked else "failed")
        assert run_state(run, Status("RUNNING", 1, job=JOB), {}) == ("running" if locked else "lost")


def test_nothing_known_of_a_run(run: RunDirectory) -> None:
    assert run_state(run, None, {}) == run_state(run, None, None) == "new"
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]  # looking leaves nothing behind
