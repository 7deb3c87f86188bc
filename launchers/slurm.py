"""hydra/launcher=slurm: sends a sweep to the cluster and returns.

Runs whose jobs ask for the same resources share an array; a last job compares them. Nothing starts before
everything is recorded:

    1. the manifest names the batches of jobs that are about to be submitted
    2. sbatch takes them, on hold
    3. the manifest and every run get the ids of their jobs
    4. the jobs are released

What a job executes lies in sweeps/<name>/: submitit's pickles of it, and the copy of the code. Whoever may
write there has code run in the name of who submitted: a CRESCENDO_HOME that several people may write to
belongs to people who trust each other. The same goes for a run directory that holds a user's own schedule:
its schedule.py is executed. What else lies in run directories is read, never executed.

Whenever this process dies, the same command goes on from the manifest: jobs of a batch without ids never left
their hold and are cancelled by the batch's name, those of a batch with ids are released.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers import manifest, scheduler, snapshot
from launchers.compose import Compose
from launchers.job import ReportJob, RunJob
from launchers.plan import Plan, Point, PointState, again, compare, freeze, make_plan, state
from launchers.preview import EXCUSES, Rates, introduce, show_shapes
from launchers.scheduler import SchedulerError
from launchers.shapes import Shape, by_shape, gpu_hours, grouped, shares
from launchers.state import UNFINISHED, run_state
from launchers.table import REFUSED, confirm, make_console, progress, say, show_command, show_launchers, tally
from pipeline.config import Config
from pipeline.environment import CODE
from pipeline.store import RunDirectory, home

REPORT_MINUTES = 30
_ALWAYS = 10**6  # how often submitit may queue a job again; job.py sees to it that each time helps


@dataclass(frozen=True)
class Batch:
    """Jobs with one name, submitted together: an array where the cluster has arrays."""

    name: str
    shape: Shape
    packs: list[list[str]]  # the runs of each job
    array: bool
    at_a_time: int


def launch(jobs: Sequence[Sequence[str]], compose: Compose) -> int:
    """Plans, freezes and submits a sweep. The exit code: 0 well, 2 invalid, 3 not confirmed."""
    plan = make_plan(progress(jobs, "composing"), compose)
    console = make_console()
    return submit(console, plan) if introduce(console, plan) else 2


def submit(console: Console, plan: Plan, known: bool = False) -> int:
    """Submits those runs of the plan that nobody is at and that are not done. `known`: the manifest holds its
    points already. The exit code as above."""
    if not scheduler.available():
        raise SchedulerError(
            f"hydra/launcher=slurm: there is no sbatch on {socket.gethostname()}. Submit from a machine of "
            f"the cluster, or use hydra/launcher=local"
        )
    with manifest.only_submitter():
        _finish_interrupted(console)
        states = _states(plan.points)
    console.print()
    say(console, f"{tally(states, EXCUSES)}.")
    todo = [point for point, s in zip(plan.points, states, strict=True) if s in UNFINISHED]
    if todo:
        shapes = by_shape([(point, _config(point)) for point in todo])
        show_shapes(console, shapes, Rates(), earliest_starts(plan.name, shapes))
        if not _confirmed(console, todo, shapes):
            return REFUSED
    with manifest.only_submitter():
        # Somebody may have been quicker.
        todo = [point for point, s in zip(todo, _states(todo), strict=True) if s in UNFINISHED]
        code = snapshot.take(manifest.path(plan.name).parent / "code") if todo else None
        freeze(todo)
        if not known:
            manifest.write(plan, "slurm")
        if code:
            batches = _batches(console, plan, todo)
            report = _submit_all(plan.name, batches, code)
            console.print()
            _show_submitted(console, plan.name, batches, report)
    if set(_states(plan.valid)) == {"done"}:
        show_command(console, "compare", compare(plan.name))
    else:
        show_launchers(console, plan.name, "watch", "cancel", "resume")
    return 0


def _states(points: Sequence[Point]) -> list[PointState]:
    queue = scheduler.queue_of(point.directory.status() for point in points if point.run)
    return [state(point, queue) for point in points]


def _show_submitted(console: Console, sweep: str, batches: Sequence[Batch], report: str) -> None:
    entries = {job["name"]: job for job in manifest.load(sweep)["jobs"]}
    for batch in batches:
        job, count = entries[batch.name]["ids"][0].partition("_")[0], len(batch.packs)
        what = f"array {job}, {count} jobs, {batch.at_a_time} at a time" if batch.array else f"{count} jobs"
        say(console, f"{what if count > 1 else f'job {job}'}: {batch.shape}")
    say(console, f"report {report} when they have ended")


def _config(point: Point) -> Config:
    assert point.config
    return point.config


# --- what is submitted


def _batches(console: Console, plan: Plan, todo: Sequence[Point]) -> list[Batch]:
    """No longer than the cluster's arrays, together at most launch.max_parallel runs at a time."""
    shapes = by_shape([(point, _config(point)) for point in todo])
    longest = scheduler.max_array_size()
    array = longest > 1
    parts: list[tuple[Shape, list[list[str]]]] = []
    for shape, points in shapes.items():
        packs = grouped([point.directory.id for point in points], shape.pack)
        parts += [(shape, part) for part in grouped(packs, longest if array else len(packs))]
    limit = _config(plan.valid[0]).launch.max_parallel
    if limit and not array:
        say(console, f"launch.max_parallel={limit}: cannot be kept, because the cluster has no arrays")
    jobs = [limit // shape.pack for shape, _ in parts] if limit else []
    at_a_time = shares(max(1, min(jobs)) if jobs else None, [len(packs) for _, packs in parts])
    return [
        Batch(f"{plan.name}.{secrets.token_hex(3)}", shape, packs, array, number)
        for (shape, packs), number in zip(parts, at_a_time, strict=True)
    ]


def _executor(
    sweep: str, name: str, parameters: dict[str, Any], code: Path, hold: bool = True
) -> SlurmExecutor:
    executor = SlurmExecutor(manifest.path(sweep).parent / "slurm" / name, max_num_timeout=_ALWAYS)
    where = [
        f"export CRESCENDO_HOME={shlex.quote(str(home()))}",
        # The snapshot of the code, not what lies in the directory in which the job starts.
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    held = {"hold": True} if hold else {}
    further = {**held, "chdir": str(home()), **parameters.pop("additional_parameters", {})}
    executor.update_parameters(
        job_name=name,
        stderr_to_stdout=True,
        wckey=None,  # submitit's own is refused by clusters that check theirs
        setup=[*parameters.pop("setup", []), *where],  # a loaded module may set PYTHONPATH
        additional_parameters=further,
        **parameters,
    )
    return executor


def earliest_starts(sweep: str, shapes: Iterable[Shape]) -> dict[Shape, str | None]:
    """When SLURM expects to start jobs of each shape. Raises SchedulerError when it would refuse them."""
    return {shape: _earliest_start(sweep, shape) for shape in shapes}


def _earliest_start(sweep: str, shape: Shape) -> str | None:
    executor = _executor(sweep, sweep, shape.parameters(), CODE, hold=False)  # held jobs are not checked
    # The text that sbatch would get; submitit offers it in no other way.
    script = executor._make_submission_file_text(executor._submitit_command_str, "")
    try:
        return scheduler.earliest_start(script)
    except SchedulerError as error:
        if "node configuration" in str(error) and scheduler.nodes_out_of_service(shape.partition):
            return "when nodes are back"  # SLURM says the same of nodes that it never had
        raise SchedulerError(f"{error}\n  for {shape}. {_remedy(str(error), shape)}".rstrip()) from None


def _remedy(refusal: str, shape: Shape) -> str:
    if "partition" in refusal.lower():
        return f"Partitions: {', '.join(scheduler.partitions())}"
    if shape.gpus_per_node and ("gres" in refusal or "node configuration" in refusal):
        return "Without GPUs: launch.device=cpu; nodes of several GPUs: launch.gpus_per_node"
    return ""


def _confirmed(console: Console, todo: Sequence[Point], shapes: dict[Shape, list[Point]]) -> bool:
    """Whether the sweep may cost what it will."""
    hours, threshold = gpu_hours(shapes), _config(todo[0]).launch.confirm_gpu_hours
    if hours <= threshold:
        return True
    cost = f"{hours:,.0f} GPU-hours until the time limits, more than launch.confirm_gpu_hours={threshold:g}"
    asked = sys.stdin.isatty()
    if asked and confirm(console, f"{cost}. Submit?"):
        return True
    say(console, "Nothing was submitted." if asked else f"Nothing was submitted: {cost}.")
    show_command(console, "submit", again(f"launch.confirm_gpu_hours={-(-hours // 1):.0f}"))
    return False


# --- all or nothing


def _submit_all(sweep: str, batches: Sequence[Batch], code: Path) -> str:
    """Submits the batches and the report on them. The report's job."""
    report = f"{sweep}.report.{secrets.token_hex(3)}"
    names = [*(batch.name for batch in batches), report]
    obsolete = manifest.report_jobs(sweep)
    intents = [_entry(batch.name, "runs", batch.packs, str(batch.shape)) for batch in batches]
    manifest.change_jobs(sweep, lambda jobs: [*jobs, *intents, _entry(report, "report", [], "")])
    try:
        ids = {batch.name: _sbatch(sweep, batch, code) for batch in progress(batches, "submitting")}
        earlier = [
            id_ for job in manifest.load(sweep)["jobs"] if job["kind"] == "runs" for id_ in job["ids"] or []
        ]
        jobs = [*(scheduler.queue(earlier) or {}), *(job for each in ids.values() for job in each)]
        after = {job.partition("_")[0] for job in jobs}
        ids[report] = [_sbatch_report(sweep, report, batches[0].shape, code, sorted(after))]
        _record(sweep, {name: {"ids": ids[name]} for name in names})
    except BaseException:
        _undo(sweep, names)
        raise
    _release(sweep, names)
    scheduler.cancel(sorted(scheduler.queue(obsolete) or {}))
    return ids[report][0]


def _entry(name: str, kind: str, runs: list[list[str]], shape: str) -> manifest.Job:
    return {"name": name, "kind": kind, "shape": shape, "runs": runs, "ids": None, "released": False}


def _sbatch(sweep: str, batch: Batch, code: Path) -> list[str]:
    """Submits a batch on hold; the id of each job."""
    parameters = batch.shape.parameters() | {"array_parallelism": batch.at_a_time}
    executor = _executor(sweep, batch.name, parameters, code)
    directories = [[str(home() / "runs" / run) for run in runs] for runs in batch.packs]
    with _sbatch_errors(), executor.batch() if batch.array else contextlib.nullcontext():
        jobs = [executor.submit(RunJob(runs)) for runs in directories]
    return [str(job.job_id) for job in jobs]


def _sbatch_report(sweep: str, name: str, shape: Shape, code: Path, after: Sequence[str]) -> str:
    parameters = {
        "time": min(REPORT_MINUTES, shape.minutes),  # a partition may allow no more
        "dependency": f"afterany:{':'.join(after)}",
        "setup": list(shape.setup),
        **{key: getattr(shape, key) for key in ("partition", "qos", "account") if getattr(shape, key)},
    }
    with _sbatch_errors():
        return str(_executor(sweep, name, parameters, code).submit(ReportJob(sweep)).job_id)


@contextmanager
def _sbatch_errors() -> Iterator[None]:
    try:
        with scheduler.clean_environment():
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        words = re.findall(r"sbatch: error: (.+)", str(error))
        raise SchedulerError(" ".join(words) or str(error)) from None


def _record(sweep: str, changes: dict[str, dict[str, Any]]) -> None:
    manifest.change_jobs(sweep, lambda jobs: [job | changes.get(job["name"], {}) for job in jobs])


def _release(sweep: str, names: Sequence[str]) -> None:
    """Tells the runs of these batches their jobs, and lets the jobs start. A run that is done or that another
    job is to run by now keeps what it is; a job that no run was told of does nothing."""
    jobs = [job for job in manifest.load(sweep)["jobs"] if job["name"] in names]
    mine = [
        (RunDirectory(home() / "runs" / run), id_)
        for job in jobs
        for runs, id_ in zip(job["runs"], job["ids"], strict=job["kind"] == "runs")
        for run in runs
    ]
    told = [status.job for run, _ in mine if (status := run.status()) and status.job]
    queue = scheduler.queue([*told, *(id_ for _, id_ in mine)]) or {}
    for run, id_ in mine:
        status = run.status()
        if status and status.state == "CANCELLED" and id_ not in queue:
            continue  # since the submission was interrupted, and its job with it
        # A job in the queue may have no more to do with it: it shares the job with others, or just ended.
        elsewhere = status and status.job in queue and run_state(run, status, queue) not in UNFINISHED
        if status and (status.state == "DONE" or status.job == id_ or elsewhere):
            continue
        run.update_status(state="PENDING", job=id_, exit_code=None, error=None)
    for job in jobs:
        scheduler.release(sorted({id_.partition("_")[0] for id_ in job["ids"]}))
    _record(sweep, {name: {"released": True} for name in names})


def _undo(sweep: str, names: Sequence[str]) -> None:
    """Cancels what was submitted and never released."""
    for name in names:
        scheduler.cancel(scheduler.named(name))
    manifest.change_jobs(sweep, lambda jobs: [job for job in jobs if job["name"] not in names])


def _finish_interrupted(console: Console) -> None:
    """Does what an earlier submission, of whatever sweep, left to do when it was killed on the way."""
    for sweep in manifest.names():
        begun = [job for job in manifest.load(sweep)["jobs"] if not job["released"]]
        if begun:
            _undo(sweep, [job["name"] for job in begun if job["ids"] is None])
            _release(sweep, [job["name"] for job in begun if job["ids"] is not None])
            say(
                console, f"A submission of {sweep} was interrupted: its held jobs were cancelled or released."
            )
