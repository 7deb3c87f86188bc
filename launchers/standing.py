"""Where the runs of a sweep stand now: their files and the scheduler's queue, put together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launchers import manifest, scheduler
from launchers.state import Queue, RunState, run_state
from pipeline.config import ConfigError, did_you_mean
from pipeline.store import RunDirectory, Status, home

ORDER: tuple[RunState, ...] = (
    "failed", "lost", "preempted", "cancelled", "running", "queued", "new", "done",
)  # fmt: skip
_SILENT_S = 600  # a running run that writes nothing for so long is said to


@dataclass(frozen=True)
class Target:
    """What a command was asked about: a sweep, or some of its runs, or a run alone."""

    name: str
    sweep: str | None
    runs: list[str]
    axes: list[str]
    values: dict[str, dict[str, str]]  # of the axes, by run
    launcher: str = "local"

    def directories(self) -> list[RunDirectory]:
        return [RunDirectory(home() / "runs" / run) for run in self.runs]

    def only(self, conditions: Sequence[str]) -> Target:
        """The runs for which every condition `axis=value,value` holds. Raises ConfigError for an unknown axis
        and when none is left."""
        runs = self.runs
        for condition in conditions:
            axis, equals, values = condition.partition("=")
            if axis not in self.axes or not equals:
                raise ConfigError(
                    f"--only {condition}: not of the form axis=value. What varies in {self.name}: "
                    f"{', '.join(self.axes) or 'nothing'}." + did_you_mean(axis, self.axes)
                )
            wanted = {values, *values.split(",")}  # a value may be a list with commas of its own
            runs = [run for run in runs if self.values[run].get(axis) in wanted]
        if not runs:
            given = {axis: sorted({v[axis] for v in self.values.values() if axis in v}) for axis in self.axes}
            known = "; ".join(f"{axis}={','.join(values)}" for axis, values in given.items())
            raise ConfigError(
                f"--only {' '.join(conditions)}: no run of {self.name} is such. There are {known}"
            )
        return replace(self, runs=runs)


def find(name: str) -> Target:
    """The sweep, or the run by its id, a unique beginning of it or its path. Raises ConfigError."""
    if found := manifest.read(name):
        points = [point for point in found["points"] if point["run"]]
        values = {point["run"]: point["axes"] for point in points}
        return Target(name, name, list(values), found["axes"], values, found["launcher"])
    at = Path(name).resolve()
    id_ = at.name if at.parent == home() / "runs" else name
    if name and any(path.parent.name.startswith(id_) for path in (home() / "runs").glob("*/config.yaml")):
        run = RunDirectory.find(id_)
        return Target(run.id, None, [run.id], [], {run.id: {}})
    known = did_you_mean(name, manifest.names()) or " All sweeps: python -m launchers ls"
    raise ConfigError(f"{name}: neither a sweep nor a run in {home()}.{known}")


@dataclass(frozen=True)
class Standing:
    """One run. None: not known."""

    run: str
    axes: Mapping[str, str]
    state: RunState
    step: int
    tokens: int
    budget: int
    attempt: int
    loss: float | None = None
    batch: int | None = None
    tokens_per_s: float | None = None
    age_s: float | None = None  # since the run last wrote
    job: str | None = None
    host: str | None = None
    note: str = ""
    unit: str = "tokens"  # what it counts, in words

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(home() / "runs" / self.run)

    @property
    def unlucky(self) -> bool:
        """Whether it failed, or its job ended without a word of it, perhaps before it began."""
        return self.state in ("failed", "lost") or (self.state == "new" and self.job is not None)


def standings(target: Target) -> tuple[list[Standing], str | None]:
    """Of every run, by state; and what keeps the scheduler from being asked, if anything does."""
    (found,), queue, problem = _look([target])
    return _with_last_words(found, queue), problem


def overview(targets: Sequence[Target]) -> tuple[list[list[Standing]], str | None]:
    """The same of several sweeps, with one question to the scheduler for all, and without its last words."""
    found, _, problem = _look(targets)
    return found, problem


def _look(targets: Sequence[Target]) -> tuple[list[list[Standing]], Queue | None, str | None]:
    runs = [target.directories() for target in targets]
    queue: Queue | None = None
    problem = None
    try:
        queue = scheduler.queue_of(run.status() for each in runs for run in each)
        if queue is None:
            problem = "There is no squeue here: the states of jobs are those in the runs' files."
    except scheduler.SchedulerError as error:
        problem = f"{error}. The states of jobs are those in the runs' files."
    # The status is read again: of a job that left the queue meanwhile it says how it ended.
    found = [
        sorted(
            (_standing(run, target.values[run.id], run.status(), queue) for run in each),
            key=lambda standing: ORDER.index(standing.state),
        )
        for target, each in zip(targets, runs, strict=True)
    ]
    return found, queue, problem


def _standing(
    run: RunDirectory, axes: Mapping[str, str], status: Status | None, queue: Queue | None
) -> Standing:
    if status is None or not run.exists():
        gone = "" if run.exists() else "its directory was deleted; the sweep's command begins it again"
        return Standing(run.id, axes, "new", 0, 0, 0, 0, note=gone)
    state = run_state(run, status, queue)
    row = run.last_row() if status.attempt else None
    if row and row["attempt"] != status.attempt and state == "running":
        row = None  # of an earlier attempt, which this one may partly repeat
    job = (queue or {}).get(status.job or "")
    age_s = max(0.0, time.time() - status.updated) if status.updated else None
    note = status.error or ""
    if state == "queued" and job:
        note = "held; the sweep's command goes on" if "Held" in job.reason else job.reason.replace("None", "")
    elif state == "running" and age_s and age_s > _SILENT_S:
        note = f"silent; {note}" if note else "silent"
    return Standing(
        run=run.id,
        axes=axes,
        state=state,
        step=row["step"] if row else status.step,
        tokens=row["tokens"] if row else status.tokens_seen,
        budget=status.budget_tokens,
        attempt=status.attempt,
        loss=row["train/loss"] if row else None,
        batch=row["batch/size"] if row and state == "running" else None,
        tokens_per_s=row["throughput/tokens_per_s"] if row and state == "running" else None,
        age_s=age_s,
        job=status.job,
        host=job.nodes if job and job.nodes else status.host,
        note=note,
        unit=status.unit,
    )


def _with_last_words(found: list[Standing], queue: Queue | None) -> list[Standing]:
    """Runs whose jobs ended without a word of them, with what the scheduler remembers of these."""
    gone = {s.run: s.job for s in found if s.unlucky and s.state != "failed" and s.job}
    words = scheduler.ended(list(gone.values())) if gone and queue is not None else {}
    notes = {run: f"job {job} ended: {words.get(job, 'no longer in the queue')}" for run, job in gone.items()}
    return [replace(standing, note=notes.get(standing.run, standing.note)) for standing in found]
