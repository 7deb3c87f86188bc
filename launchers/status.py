"""python -m launchers ls | status | watch: where sweeps and their runs stand."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from launchers import manifest
from launchers.control import cancel
from launchers.plan import compare
from launchers.standing import Standing, Target, find, overview, standings
from launchers.state import UNFINISHED
from launchers.table import (
    DASH,
    GAP,
    Column,
    axis_columns,
    count,
    duration,
    or_blank,
    say,
    screen_width,
    show_command,
    show_launchers,
    table,
    tally,
    total_width,
)
from pipeline.config import common_unit
from pipeline.store import home, python

POLL_S = (10.0, 60.0)  # of the scheduler, by `watch`: at first, and when nothing happens
_NOTE_WIDTH = 30  # at least, of the head of an error
_ALIVE = ("running", "queued")


def ls(console: Console, as_json: bool) -> int:
    """All sweeps, one line each."""
    sweeps = [(manifest.load(name), find(name)) for name in manifest.names()]
    found, problem = overview([target for _, target in sweeps])
    if as_json:
        lines = [
            {
                "sweep": target.name,
                "launcher": target.launcher,
                "created": kept["created"],
                "runs": len(each),
                "states": _counts(each),
                "problem": problem,
            }
            for (kept, target), each in zip(sweeps, found, strict=True)
        ]
        console.print(json.dumps(lines, indent=1), soft_wrap=True)
        return 0
    if not sweeps:
        say(console, f"No sweep in {home()} yet. CRESCENDO_HOME is where sweeps are looked for.")
        show_command(console, "begin", shlex.join([python(), "-m", "pipeline", "-m", "experiment=demo"]))
        return 0
    columns = [
        Column("sweep", [target.name for _, target in sweeps], "left"),
        Column(
            "created", [time.strftime("%F %H:%M", time.localtime(m["created"])) for m, _ in sweeps], "left"
        ),
        Column("launcher", [target.launcher for _, target in sweeps], "left", optional=1),
        Column("runs", [str(len(each)) for each in found]),
        Column("trained", [_share(each) for each in found]),
        Column("states", [tally((s.state for s in each), {}) for each in found], "left"),
    ]
    console.print(table(columns, screen_width(console)), soft_wrap=True)
    if problem:
        say(console, problem, style="yellow")
    show_launchers(console, sweeps[-1][1].name, "status")
    return 0


def status(console: Console, target: Target, as_json: bool) -> int:
    """One line a run, by state. The exit code is 1 when some run failed, or its job ended without a word."""
    found, problem = standings(target)
    if as_json:
        console.print(json.dumps(to_json(target, found, problem), indent=1), soft_wrap=True)
    else:
        for part in _screen(console, target, found, problem, room=None):
            console.print(part, soft_wrap=True)  # as a group they would be cut to 80 characters in a pipe
        _show_next(console, target, found)
    return _exit_code(found)


def watch(console: Console, target: Target, as_json: bool) -> int:
    """`status`, redrawn until nothing runs or waits any more. On Ctrl-C asks whether to quit or to cancel."""
    if as_json or not console.is_terminal:
        return _watch_lines(console, target, as_json)
    while True:
        try:
            found = _watch_live(console, target)
            break
        except KeyboardInterrupt:
            if (code := _ask(console, target)) is not None:
                return code
    _show_next(console, target, found)
    return _exit_code(found)


def to_json(target: Target, found: Sequence[Standing], problem: str | None) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "name": target.name,
        "launcher": target.launcher,
        "states": _counts(found),
        "problem": problem,
        "runs": [asdict(standing) for standing in found],
    }


# --- watching


def _watch_live(console: Console, target: Target) -> list[Standing]:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def show(found: list[Standing], problem: str | None) -> None:
            lines = _screen(console, target, found, problem, room=console.height - 6)
            live.update(Group(*lines), refresh=True)

        return _poll(target, show)


def _watch_lines(console: Console, target: Target, as_json: bool) -> int:
    def show(found: list[Standing], problem: str | None) -> None:
        if as_json:
            line = json.dumps(to_json(target, found, problem))
        else:
            line = f"{time.strftime('%T')}  {_summary(found)}"
        console.print(line, soft_wrap=True)

    found = _poll(target, show)
    if not as_json:
        _show_next(console, target, found)
    return _exit_code(found)


def _poll(target: Target, show: Callable[[list[Standing], str | None], None]) -> list[Standing]:
    """Shows the standings now and then: often while states change, else seldom."""
    interval_s = POLL_S[0]
    counts: dict[str, int] = {}
    idle = False
    while True:
        found, problem = standings(target)
        show(found, problem)
        states = {standing.state for standing in found}
        # Of a sweep here the next run may be about to begin: that none does shows at the second look.
        if not states & set(_ALIVE) and (idle or "new" not in states):
            return found
        idle = not states & set(_ALIVE)
        changed = _counts(found) != counts
        interval_s = POLL_S[0] if changed else min(POLL_S[1], 1.25 * interval_s)
        counts = _counts(found)
        time.sleep(interval_s)


def _ask(console: Console, target: Target) -> int | None:
    """After Ctrl-C: the exit code, or None to go on watching."""
    try:
        answer = console.input("\n[q]uit watching, [c]ancel the runs, [r]esume watching? ").strip().lower()
    except (KeyboardInterrupt, EOFError):
        answer = "q"
    if answer.startswith("c"):
        return cancel(console, target, yes=False, as_json=False)
    if answer.startswith("r"):
        return None
    say(console, "The sweep goes on.")
    show_launchers(console, target.name, "watch", "cancel")
    return 0


# --- the screen


def _screen(
    console: Console, target: Target, found: Sequence[Standing], problem: str | None, room: int | None
) -> list[Text]:
    """Everything, or of a live screen as many runs as it has room for: those with trouble first."""
    head = f"{target.name}: {_summary(found)}"
    shown = list(found[:room])
    lines = [Text(head, "bold"), _table(console, target, shown)]
    if len(shown) < len(found):
        lines.append(Text(f"… and {len(found) - len(shown)} more: python -m launchers status {target.name}"))
    if problem:
        lines.append(Text(problem, "yellow"))
    return lines


def _table(console: Console, target: Target, found: Sequence[Standing]) -> Text:
    unit = _unit(found)
    columns = [
        Column("run", [standing.run for standing in found], "left"),
        *axis_columns(target.axes, [standing.axes for standing in found]),
        Column("state", [standing.state for standing in found], "left"),
        Column(unit, [_percent(standing) for standing in found]),
        Column("step", [str(s.step) if s.attempt else "" for s in found]),
        Column("loss", [or_blank("{:.3f}".format, s.loss) for s in found]),
        Column("batch", [or_blank(str, s.batch) for s in found], optional=4),
        Column(f"{unit}/s", [count(s.tokens_per_s) if s.tokens_per_s else "" for s in found], optional=2),
        Column("attempt", [str(s.attempt) if s.attempt else "" for s in found], optional=3),
        Column("last word", [_age(standing) for standing in found], optional=5),
        Column("job", [s.job or "" for s in found], "left", optional=6),
        Column("node", [s.host or "" if s.state == "running" else "" for s in found], "left", optional=7),
    ]
    columns = [column for column in columns if not column.optional or any(column.cells)]
    width = screen_width(console)
    if any(standing.note for standing in found):
        room = max(_NOTE_WIDTH, width - total_width(columns) - GAP)
        notes = [s.note if len(s.note) <= room else s.note[: room - 1] + "…" for s in found]
        columns.append(Column("note", notes, "left"))
    return table(columns, width)


def _show_next(console: Console, target: Target, found: Sequence[Standing]) -> None:
    states = {standing.state for standing in found}
    failed = [standing for standing in found if standing.unlucky]
    console.print()
    if failed:
        show_launchers(console, failed[0].run, "logs")
    if target.sweep and states & set(UNFINISHED):
        show_launchers(console, target.name, "resume")
    if states & set(_ALIVE):
        show_launchers(console, target.name, "watch")
    elif target.sweep and "done" in states:
        show_command(console, "compare", compare(target.name))


def _exit_code(found: Sequence[Standing]) -> int:
    return 1 if any(standing.unlucky for standing in found) else 0


def _summary(found: Sequence[Standing]) -> str:
    """`2 running, 5 queued, 31% of 6.4M tokens, 24.1k tokens/s`."""
    budget = sum(standing.budget for standing in found)
    rate = sum(standing.tokens_per_s or 0 for standing in found)
    words = [tally((standing.state for standing in found), {})]
    words += [f"{_share(found)} of {count(budget)} {_unit(found)}"] if budget else []
    words += [f"{count(rate)} {_unit(found)}/s"] if rate else []
    return ", ".join(words)


def _counts(found: Sequence[Standing]) -> dict[str, int]:
    return Counter(standing.state for standing in found)


def _unit(found: Sequence[Standing]) -> str:
    return common_unit(standing.unit for standing in found)


def _share(found: Sequence[Standing]) -> str:
    budget = sum(standing.budget for standing in found)
    return f"{sum(standing.tokens for standing in found) / budget:.0%}" if budget else DASH


def _percent(standing: Standing) -> str:
    return f"{standing.tokens / standing.budget:.0%}" if standing.budget and standing.attempt else ""


def _age(standing: Standing) -> str:
    return duration(standing.age_s) if standing.age_s is not None and standing.attempt else ""
