"""python -m launchers cancel | resume: ends runs, and goes on with those that are missing."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from launchers import manifest, scheduler
from launchers.plan import Plan, Point
from launchers.standing import Standing, Target, find, standings
from launchers.table import REFUSED, confirm, say, show_launchers, tally
from pipeline.attempt import for_attempt
from pipeline.config import ConfigError, check
from pipeline.store import AlreadyRunning, RunDirectory
from pipeline.worker import STOP_GRACE_S

_POLL_S = 2.0
_END_S = 60.0  # for a cancelled job to leave the queue


def cancel(
    console: Console, target: Target, *, pending: bool = False, now: bool = False, yes: bool, as_json: bool
) -> int:
    """Ends what waits and, unless only what is `pending` is meant, what runs: at its next step, with a
    checkpoint, or `now`, where a run has a job of its own. The exit code: 0 ended, 1 something still runs,
    3 not confirmed."""
    found, problem = standings(target)
    if problem:
        raise ConfigError(problem)
    found = [standing for standing in found if standing.directory.path.is_dir()]
    waiting = [standing for standing in found if standing.state in ("queued", "new")]
    running = [] if pending else [standing for standing in found if standing.state == "running"]
    what = tally((standing.state for standing in [*running, *waiting]), {})
    if what and not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"cancel {target.name}: {what}. Nobody is here to confirm it: add --yes")
        if not confirm(console, f"Cancel {what} of {target.name}?"):
            return REFUSED
    with manifest.only_submitter():
        _end_waiting(waiting)  # first, lest the scheduler starts them in the place of those that end
    if running and not now and not as_json:
        say(console, f"{len(running)} stop at their next step, with a checkpoint …")
    left = running if now else _await_end(target, running, STOP_GRACE_S)
    if left:  # they had their time
        _cancel_jobs(left)
        left = _await_end(target, left, _END_S)
    late = {standing.run for standing in left}
    ended = [s for s in [*waiting, *running] if s.run not in late and _mark_cancelled(s.directory)]
    _end_report(target)
    _tell(console, target, ended, left, as_json)
    return 1 if left else 0


def resume(console: Console, target: Target, changes: Sequence[str], launcher: str | None) -> int:
    """Runs or submits again what is missing of a sweep, from its frozen configs and newest checkpoints, with
    `changes` to launch.* settings. The exit code is the launcher's."""
    if bad := [change for change in changes if not change.startswith("launch.")]:
        raise ConfigError(
            f"{bad[0]}: only launch.* can change when a run is resumed; with anything else it would be "
            f"another run. Give the sweep's command with it for that"
        )
    target = target if target.sweep else _in_its_sweep(target)
    if not target.sweep and launcher == "slurm":
        raise ConfigError(
            f"--launcher slurm: run {target.name} belongs to no sweep. Submit it with its own command and "
            f"hydra/launcher=slurm"
        )
    points: list[Point] = []
    problems: list[str] = []
    for run in target.directories():
        try:
            points.append(_point(run, target, changes))
        except ConfigError as error:
            problems += error.problems
    if not points:
        raise ConfigError(*problems)
    say(console, *problems, style="yellow")
    plan = Plan(target.name, points, target.axes, common={}, zips=[], duplicates=0, excluded=[], unmet=[])
    if (launcher or target.launcher) == "slurm":
        from launchers import slurm

        return slurm.submit(console, plan, known=True)
    from launchers import local

    return local.run_plan(plan, known=True)


def _point(run: RunDirectory, target: Target, changes: Sequence[str]) -> Point:
    try:
        frozen = run.config()
        # The launch alone: what else an attempt has fixed is no part of the frozen run.
        config = replace(frozen, launch=for_attempt(frozen, changes).launch)
        check(config)
    except ConfigError as error:
        raise ConfigError(
            f"run {run.id}: {error}",
            f"A run whose directory was deleted begins again with {_command(run, target)}",
        ) from None
    return Point(target.values[run.id], list(changes), run.id, config, None)


def _command(run: RunDirectory, target: Target) -> str:
    """What asked for the run."""
    points = manifest.load(target.sweep)["points"] if target.sweep else []
    commands = [point["command"] for point in points if point["run"] == run.id]
    return shlex.join(commands[0]) if commands else "the command that asked for it"


def _in_its_sweep(target: Target) -> Target:
    """A run alone as part of the newest sweep that lists it, so that it goes on where the sweep does; itself
    when none does."""
    sweeps = (find(name) for name in reversed(manifest.names()))
    return next((replace(sweep, runs=target.runs) for sweep in sweeps if target.name in sweep.values), target)


def _cancel_jobs(found: Sequence[Standing]) -> None:
    """Not those that they share with other runs: such a job passes over runs that are cancelled, and a stop
    file ends those that it has begun."""
    if not found:
        return
    runs = {standing.run for standing in found}
    # Of all sweeps: a run may be named alone, and its job be another sweep's.
    batches = [batch for sweep in manifest.names() for batch in manifest.load(sweep)["jobs"]]
    packs = {id_: pack for b in batches for id_, pack in zip(b["ids"] or [], b["runs"], strict=False)}
    # Of an interrupted submission a run may not know its job yet, which is on hold.
    held = {id_ for b in batches if not b["released"] for id_ in b["ids"] or [] if id_ in packs}
    mine = {s.job for s in found if s.job} | (held & (scheduler.queue(held) or {}).keys())
    jobs = {id_ for id_ in mine if runs.issuperset(packs.get(id_, ()))}
    if jobs:
        scheduler.cancel(sorted(jobs))


def _end_waiting(waiting: Sequence[Standing]) -> None:
    for standing in waiting:
        _mark_cancelled(standing.directory)
    _cancel_jobs(waiting)


def _await_end(target: Target, found: Sequence[Standing], patience_s: float) -> list[Standing]:
    """Those that still run, or wait to go on, when the patience ends. Asks them to stop again and again: a
    run that just begins overlooks what was asked before, one that is just preempted queues itself again."""
    runs = {standing.run for standing in found}
    deadline = time.monotonic() + patience_s
    while runs:
        left = [s for s in standings(target)[0] if s.run in runs and s.state in ("running", "queued")]
        if not left or time.monotonic() > deadline:
            return left
        _end_waiting([standing for standing in left if standing.state == "queued"])
        for standing in left:
            if standing.state == "running":
                standing.directory.request_stop("CANCELLED")
        time.sleep(_POLL_S)
    return []


def _end_report(target: Target) -> None:
    """Where nothing is left to run, there is nothing to wait for and compare."""
    if target.sweep is None:
        return
    found, problem = standings(find(target.sweep))
    if not problem and not any(standing.state in ("running", "queued") for standing in found):
        scheduler.cancel(sorted(scheduler.queue(manifest.report_jobs(target.sweep)) or {}))


def _mark_cancelled(run: RunDirectory) -> bool:
    """Also a run that was killed without a word. Whether it is: it may have come to its end sooner."""
    try:
        with run.lock():
            status = run.status()
            run.clear_stop()
            if status and status.state in ("PENDING", "RUNNING", "PREEMPTED"):
                run.update_status(state="CANCELLED", error="cancelled")
    except AlreadyRunning:
        pass
    status = run.status()
    return status is not None and status.state == "CANCELLED"


def _tell(
    console: Console, target: Target, ended: Sequence[Standing], left: Sequence[Standing], as_json: bool
) -> None:
    if as_json:
        told = {"cancelled": [s.run for s in ended], "still_running": [s.run for s in left]}
        console.print(json.dumps(told, indent=1), soft_wrap=True)
        return
    if not ended and not left:
        say(console, "Nothing waits or runs.")
        return
    say(console, f"{len(ended)} cancelled." + (f" {len(left)} still run." if left else ""))
    if target.sweep:
        show_launchers(console, target.name, "resume")
