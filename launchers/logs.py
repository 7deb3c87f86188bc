"""python -m launchers logs: what runs printed, and the traceback of those that failed."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launchers.screen import NUMBER, end_of
from launchers.standing import Standing, Target, standings
from launchers.table import name_points, say
from pipeline.config import ConfigError
from pipeline.store import RunDirectory, home

LINES = 40
_POLL_S = 0.5
_ASK_S = 5.0  # between questions to the scheduler, while nothing is printed
_TAIL_BYTES = 65536
_NAME = re.compile(r"attempt-(\d+)\.rank-(\d+)\.log")


@dataclass(frozen=True)
class Log:
    """One file that a run has written."""

    path: Path
    attempt: int | None  # None: of the job around the ranks
    rank: int | None

    def end(self) -> str:
        return end_of(self.path, _TAIL_BYTES)


def logs(
    console: Console, target: Target, rank: int | None, attempt: int | None, follow: bool, as_json: bool
) -> int:
    """Of one run: the log of a rank, by default of the newest attempt and the rank that tells most. Of a
    sweep: one for every run that failed."""
    found = standings(target)[0]
    if target.sweep is not None and len(found) > 1:
        found = [standing for standing in found if standing.unlucky]
        if not found and not as_json:
            say(console, f"No run of {target.name} failed. The log of one: python -m launchers logs RUN")
            return 0
        if follow:
            raise ConfigError("-f: follows one run. python -m launchers logs -f RUN")
    chosen, missing = [], {}
    for standing in found:
        try:
            chosen.append((standing, choose(standing.directory, rank, attempt)))
        except ConfigError as error:
            missing[standing.run] = str(error)
    if missing and not chosen:
        raise ConfigError(*missing.values())
    if as_json:
        told = [{"run": s.run, **asdict(log), "path": str(log.path), "text": log.end()} for s, log in chosen]
        nothing = dict.fromkeys(("path", "attempt", "rank", "text"))
        told += [{"run": run, **nothing} for run in missing]
        console.print(json.dumps(told, indent=1), soft_wrap=True)
        return 0
    for alike in _by_error(chosen):
        _show(console, *alike[0])
        if others := [standing.run for standing, _ in alike[1:]]:
            say(console, f"The same of {len(others)} more: {' '.join(others)}")
    say(console, *missing.values())
    if follow:
        _follow(console, target, chosen[0][1], rank)
    return 0


def _by_error(chosen: list[tuple[Standing, Log]]) -> list[list[tuple[Standing, Log]]]:
    """Runs that failed alike, whatever the numbers in their errors, stand together."""
    groups: dict[str, list[tuple[Standing, Log]]] = {}
    for standing, log in chosen:
        groups.setdefault(NUMBER.sub("0", standing.note), []).append((standing, log))
    return list(groups.values())


def choose(run: RunDirectory, rank: int | None, attempt: int | None) -> Log:
    """Raises ConfigError when there is none, saying which there are."""
    found = [
        Log(path, int(name[1]), int(name[2]))
        for path in run.logs.glob("attempt-*.rank-*.log")
        if (name := _NAME.fullmatch(path.name))
    ]
    newest = attempt or max((log.attempt or 0 for log in found), default=0)
    mine = sorted((log for log in found if log.attempt == newest), key=lambda log: log.rank or 0)
    if rank is not None:
        mine = [log for log in mine if log.rank == rank]
    if mine:
        return next((log for log in mine if "Traceback" in log.end()), mine[0])
    if attempt is None and rank is None and (around := _around(run)):
        return around
    known = ", ".join(sorted(f"attempt {log.attempt} rank {log.rank}" for log in found)) or "none yet"
    raise ConfigError(f"run {run.id}: no such log in {run.logs}. There are: {known}")


def _around(run: RunDirectory) -> Log | None:
    """Where no rank has printed: the output of what should have started it."""
    status = run.status()
    jobs = (home() / "sweeps").glob(f"*/slurm/*/{status.job}_0_log.out") if status and status.job else ()
    path = next((path for path in (*jobs, run.logs / "launcher.log") if path.exists()), None)
    return Log(path, None, None) if path else None


def _show(console: Console, standing: Standing, log: Log) -> None:
    lines = log.end().rstrip().splitlines()[-LINES:]
    begins = max((i for i, line in enumerate(lines) if line.startswith("Traceback")), default=len(lines))
    axes = name_points([standing.axes]) if standing.axes else ""
    console.print()
    say(console, " ".join(filter(None, [standing.run, axes, standing.state])), style="bold")
    if standing.note:
        say(console, f"  {standing.note}")
    say(console, f"  {os.path.relpath(log.path)}")
    console.print(Text("\n".join(lines[:begins])), soft_wrap=True)
    if lines[begins:]:
        traceback = Text("\n".join(lines[begins:]))
        framed = Panel(traceback, title="traceback", border_style="red")
        console.print(framed if console.is_terminal else traceback, soft_wrap=True)


def _follow(console: Console, target: Target, log: Log, rank: int | None) -> None:
    """Prints what is added, also by later attempts, until the run ends."""
    run = RunDirectory(home() / "runs" / target.runs[0])
    position = log.path.stat().st_size
    asked = time.monotonic()
    while True:
        # Before it reads: a run may print its last words while the scheduler is asked.
        ended = False
        if time.monotonic() - asked > _ASK_S:
            ended = standings(target)[0][0].state not in ("running", "queued")
            asked = time.monotonic()
        with open(log.path, "rb") as file:
            file.seek(position)
            if added := file.read():
                console.print(Text(added.decode(errors="replace")), end="", soft_wrap=True)
                position += len(added)
        newest = choose(run, rank, None)
        if newest.path != log.path and newest.attempt != log.attempt:
            log, position = newest, 0
            say(console, f"— attempt {log.attempt}")
            continue
        if not added and ended:
            return
        time.sleep(_POLL_S)
