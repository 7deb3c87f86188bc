"""How far a run has come: what its files say, and what the scheduler says of its job.

Neither is enough alone: a run that was killed still says RUNNING, a queued one how it ended the last time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.store import RunDirectory, Status

RunState = Literal["new", "queued", "running", "done", "failed", "preempted", "cancelled", "lost"]

UNFINISHED: tuple[RunState, ...] = ("new", "failed", "preempted", "cancelled", "lost")  # and nobody is at it

_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


@dataclass(frozen=True)
class QueuedJob:
    """A job that is in the scheduler's queue: waiting, running or just ending."""

    state: str  # SLURM's word
    reason: str = ""  # why it waits
    nodes: str = ""

    @property
    def running(self) -> bool:
        return self.state in _RUNNING


Queue = Mapping[str, QueuedJob]  # by job: "123_4", or "123" without an array


def run_state(run: RunDirectory, status: Status | None, queue: Queue | None) -> RunState:
    """Of a run with this status. Where no scheduler can be asked, its job is what its files say."""
    if status is None or not run.exists():
        return "new"
    if status.state == "DONE":
        return "done"
    if status.job and queue is None and status.state in ("PENDING", "RUNNING"):
        return "running" if status.state == "RUNNING" else "queued"
    if job := (queue or {}).get(status.job or ""):
        return _state_in_queue(status, job)
    if run.is_locked():
        return "running"
    return _left_behind(status)


def _state_in_queue(status: Status, job: QueuedJob) -> RunState:
    if status.state == "CANCELLED":
        return "cancelled"  # the job passes over it, or is just ending
    if not job.running or status.state == "PREEMPTED":  # such a job queues itself again, or has begun again
        return "queued"
    return "failed" if status.state == "FAILED" else "running"  # the former: other runs share the job


def _left_behind(status: Status) -> RunState:
    """Of a run that nobody is at."""
    states: dict[str, RunState] = {
        "PENDING": "new",
        "RUNNING": "lost",  # it died without a word
        "FAILED": "failed",
        "PREEMPTED": "preempted",
        "CANCELLED": "cancelled",
    }
    return states[status.state]
