"""What a running sweep looks like: a live table on a terminal, lines elsewhere, and how it ended."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from launchers.plan import Plan, Point, again, compare
from launchers.table import (
    Column,
    axis_columns,
    count,
    duration,
    name_points,
    or_blank,
    say,
    screen_width,
    show_command,
    table,
    tally,
)
from pipeline.config import Config, ConfigError, common_unit
from pipeline.store import Row, RunDirectory, home, python, read_rows

REDRAW_S = 0.5
LINE_S = 10.0  # between progress lines where there is no terminal
TRACEBACK_LINES = 6
_TAIL_BYTES = 8192
_ENOUGH_FOR_AN_ESTIMATE = 0.03  # share of the remaining tokens; before it, starting up dominates the speed

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)

States = Mapping[str, str]  # run -> waiting, running, done, failed, cancelled, elsewhere


@dataclass(frozen=True)
class Progress:
    """How far a run's current attempt has come, from its files. None: not known yet."""

    step: int
    tokens: int
    budget: int
    loss: float | None = None
    batch: int | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None  # since the attempt began
    attempt: int = 0  # 0: none has begun


def read_progress(point: Point, state: str, earlier: int = 0) -> Progress:
    """Of a finished run the speed of the whole and the batch it had come to: its last step is cut to the
    budget and stands for neither.

    The first `earlier` attempts were there before the sweep. A run that waits or has just been started has
    nothing of them yet: how much the next attempt takes over shows when it has begun.
    """
    assert point.config
    status, row = point.directory.status(), point.directory.last_row()
    budget = point.config.trained_tokens
    begun = status is not None and status.attempt > (earlier if state in ("waiting", "running") else 0)
    if status is None or not begun:
        return Progress(0, 0, budget)
    if row and row["attempt"] != status.attempt and state != "done":
        row = None
    end = time.time() if state == "running" else status.updated
    seconds = end - status.started if end and status.started else None
    if row is None:
        return Progress(
            status.step,
            max(0, status.tokens_seen - point.config.first_token),
            budget,
            seconds=seconds,
            attempt=status.attempt,
        )
    done = state == "done" and row["time"] > 0
    tokens = row["tokens"] - point.config.first_token  # of a branch its own
    return Progress(
        step=row["step"],
        tokens=tokens,
        budget=budget,
        loss=row["train/loss"],
        batch=_whole_batch(row, point.config) if done else row["batch/size"],
        tokens_per_s=tokens / row["time"] if done else row["throughput/tokens_per_s"],
        seconds=seconds,
        attempt=status.attempt,
    )


def _whole_batch(row: Row, config: Config) -> int:
    """The batch that this step would have had if the budget did not cut it. In sequences."""
    multiple = config.batch_multiple
    size: int = max(1, math.ceil(row["batch/requested"] / multiple)) * multiple
    return min(size, config.batch_plan().largest)


def tokens_at_begin(point: Point, attempt: int) -> int | None:
    """The tokens that an attempt took over from its checkpoint; None before its first row. Its own work
    starts there, and what an earlier attempt did beyond it is done again."""
    assert point.config
    try:
        rows = read_rows(point.directory.metrics_file)
    except ConfigError:  # a damaged line: the run's own trouble
        return None
    first = next((row for row in rows if row["attempt"] == attempt), None)
    if first is None:
        return None
    # The row of an evaluation stands where the attempt began, that of a step one step further.
    begun = first["tokens"] - first.get("batch/size", 0) * point.config.data.sequence_length
    return int(begun - point.config.first_token)


class View:
    """Follows a sweep. Only running points are read again: the files of the others do not change."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console, self.plan = console, plan
        self.states: States = {}
        self.progress: dict[str, Progress] = {}
        self._begun = time.monotonic()
        statuses = {point.run or "": point.directory.status() for point in plan.valid}
        self._earlier = {run: status.attempt if status else 0 for run, status in statuses.items()}
        self._taken_over: dict[str, int | None] = {}  # of each run started here: tokens that it began with

    def update(self, states: States, changed: Sequence[Point], last: bool = False) -> None:
        raise NotImplementedError

    def read(self, states: States, changed: Sequence[Point]) -> None:
        self.states = dict(states)
        fresh = {point.run for point in changed}
        for point in self.plan.valid:
            run = point.run or ""
            if run not in self.progress or run in fresh or states[run] == "running":
                self.progress[run] = read_progress(point, states[run], self._earlier[run])
                if states[run] == "running":
                    self._taken_over.setdefault(run, None)
                attempt = self.progress[run].attempt
                if attempt > self._earlier[run] and self._taken_over.get(run, 0) is None:
                    self._taken_over[run] = tokens_at_begin(point, attempt)

    @property
    def unit(self) -> str:
        """What the runs count, in words."""
        return common_unit(point.config.unit for point in self.plan.valid if point.config)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def summary(self) -> list[str]:
        """`2 done, 1 running, 5 waiting` and `31% of 6.4M tokens, 24.1k tokens/s, 1:20 so far, 3:04 left`."""
        budget = sum(p.budget for p in self.progress.values())
        tokens = sum(p.tokens for p in self.progress.values())
        trained = sum(
            max(0, self.progress[run].tokens - taken)
            for run, taken in self._taken_over.items()
            if taken is not None
        )
        rate = trained / self.elapsed
        ahead = sum(
            p.budget - p.tokens
            for run, p in self.progress.items()
            if self.states[run] in ("waiting", "running")
        )
        parts = [f"{tokens / budget:.0%} of {count(budget)} {self.unit}"]
        if trained > 0:
            parts.append(f"{count(rate)} {self.unit}/s")
        parts.append(f"{duration(self.elapsed)} so far")
        if "running" in self.states.values() and trained > _ENOUGH_FOR_AN_ESTIMATE * ahead:
            parts.append(f"{duration(ahead / rate)} left")
        return [tally(self.states.values(), {}), ", ".join(parts)]

    def rows(self, points: Sequence[Point]) -> list[Column]:
        runs = [point.run or "" for point in points]
        progress = [self.progress[run] for run in runs]
        tokens, sequences = ("tok", "seq") if self.unit == "tokens" else ("samples", "samples")
        return [
            Column("run", runs, "left"),
            *axis_columns(self.plan.axes, [point.axes for point in points]),
            Column("state", [self.states[run] for run in runs], "left"),
            Column("step", [str(p.step) if p.step else "" for p in progress], optional=3),
            Column(self.unit, [f"{count(p.tokens)}/{count(p.budget)}" for p in progress], optional=5),
            Column("%", [f"{p.tokens / p.budget:.0%}" for p in progress]),
            Column("loss", [or_blank("{:.3f}".format, p.loss) for p in progress]),
            Column(f"{sequences}/step", [or_blank(str, p.batch) for p in progress], optional=2),
            Column(f"{tokens}/s", [or_blank(count, p.tokens_per_s) for p in progress], optional=1),
            Column("time", [or_blank(duration, p.seconds) for p in progress], optional=4),
        ]


class LiveView(View):
    """A table that is drawn again in place."""

    def __init__(self, console: Console, plan: Plan, live: Live) -> None:
        super().__init__(console, plan)
        self._live, self._drawn = live, 0.0

    def update(self, states: States, changed: Sequence[Point], last: bool = False) -> None:
        now = time.monotonic()
        if changed or last or now - self._drawn > REDRAW_S:
            self._drawn = now
            self.read(states, changed)
            self._live.update(self._draw(whole=last), refresh=True)

    def _draw(self, whole: bool) -> Group:
        points = self.plan.valid
        shown = points if whole else choose(points, self.states, room=self.console.height - 7)
        hidden = [self.states[p.run or ""] for p in points if p not in shown]
        more = [f"and {len(hidden)} more: {tally(hidden, {})}"] if hidden else []
        below = Text("\n".join([*more, "", *self.summary()]), no_wrap=True, overflow="ellipsis")
        return Group(Text(), table(self.rows(shown), self.console.width), below)


class LineView(View):
    """A line whenever a run starts or ends, and one on the whole sweep now and then."""

    def __init__(self, console: Console, plan: Plan) -> None:
        super().__init__(console, plan)
        self._printed = time.monotonic()

    def update(self, states: States, changed: Sequence[Point], last: bool = False) -> None:
        due = time.monotonic() - self._printed > LINE_S
        if not (changed or last or due):
            return
        self.read(states, changed)
        for point in changed:
            self._print(self._line(point))
        if due or last:
            self._print("; ".join(self.summary()))
            self._printed = time.monotonic()
        if last:
            self.console.print()
            self.console.print(table(self.rows(self.plan.valid), screen_width(self.console)), soft_wrap=True)

    def _line(self, point: Point) -> str:
        run = point.run or ""
        state, progress = self.states[run], self.progress[run]
        line = f"{run} {name_points([point.axes])}".rstrip()
        if state == "running":
            return f"{line}: started"
        if state == "done":
            line += f": done, {count(progress.tokens)} {self.unit}"
            return line + or_blank(", loss {:.3f}".format, progress.loss)
        return f"{line}: {'is being run by another process' if state == 'elsewhere' else state}"

    def _print(self, line: str) -> None:
        self.console.print(f"{duration(self.elapsed):>8}  {line}", soft_wrap=True)


@contextlib.contextmanager
def screen(console: Console, plan: Plan) -> Iterator[View]:
    """The view that fits where the output goes."""
    if not console.is_terminal:
        yield LineView(console, plan)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield LiveView(console, plan, live)


def choose(points: Sequence[Point], states: States, room: int) -> list[Point]:
    """The points worth the lines a screen has, in their order: what runs, what failed, what comes next."""
    interest = {"running": 0, "failed": 1, "cancelled": 1, "elsewhere": 2, "waiting": 3, "done": 4}
    ranked = sorted(range(len(points)), key=lambda i: (interest.get(states[points[i].run or ""], 1), i))
    return [points[i] for i in sorted(ranked[: max(1, room)])]


def conclude(console: Console, plan: Plan, states: States, signal_number: int | None) -> None:
    """How the sweep ended and what to type next."""
    show_failures(console, [point for point in plan.valid if states[point.run or ""] == "failed"])
    console.print()
    if signal_number:
        cause = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        say(console, f"Stopped by {cause}: {tally(states.values(), {})}.")
        show_command(console, "continue", again())
        return
    if {"failed", "cancelled", "preempted", "lost"} & set(states.values()):
        show_command(console, "retry", again())
    wandb = home() / "sweeps" / plan.name / "wandb"
    if any(wandb.glob("*")):
        show_command(console, "browse", shlex.join([python(), "-m", "wandb", "leet", os.path.relpath(wandb)]))
    if elsewhere := [point.axes for point in plan.valid if states[point.run or ""] == "elsewhere"]:
        runs = "1 run is" if len(elsewhere) == 1 else f"{len(elsewhere)} runs are"
        names = f" ({names})" if (names := name_points(elsewhere)) else ""
        say(console, f"{runs} still being run by another process{names}: compare again when it has ended.")
    if "done" in states.values():
        show_command(console, "compare", compare(plan.name))


def show_failures(console: Console, points: Sequence[Point]) -> None:
    """Each error once, whatever its numbers, with the runs it ended and the last words of the first."""
    errors: dict[str, list[Point]] = {}
    for point in points:
        errors.setdefault(NUMBER.sub("0", _error(point)), []).append(point)
    for alike in errors.values():
        error = _error(alike[0])
        console.print()
        axes = name_points([point.axes for point in alike])
        say(console, f"{len(alike)} failed: {axes}", style="bold red")
        say(console, f"  {error}")
        log, lines = last_words(alike[0].directory)
        for line in lines:
            if _repeats(line, error):
                continue
            console.print(f"  │ {line}"[: screen_width(console)], soft_wrap=True)
        if log:
            say(console, f"  {os.path.relpath(log)}")


def _error(point: Point) -> str:
    status = point.directory.status()
    return status.error if status and status.error else "the reason was not recorded"


def _repeats(line: str, error: str) -> bool:
    """Whether a line of a log says the error again: `some.module.ValueError: …` or `run …: FAILED: …`."""
    said = re.sub(r"^(\w+\.)+(?=\w+(:|$))", "", line.strip())
    return error in said or error.endswith(f": {said}")


def last_words(run: RunDirectory) -> tuple[Path | None, list[str]]:
    """The log that tells most of the newest attempt, and the end of its last traceback."""
    logs: dict[int, list[Path]] = {}
    for path in sorted(run.logs.glob("attempt-*.rank-*.log")):
        if found := re.match(r"attempt-(\d+)\.", path.name):
            logs.setdefault(int(found[1]), []).append(path)
    candidates = [*(logs[max(logs)] if logs else []), run.logs / "launcher.log"]
    texts = [(path, end_of(path)) for path in candidates if path.exists()]
    telling = [(path, text) for path, text in texts if "Traceback" in text] or texts[-1:]
    if not telling:
        return None, []
    path, text = telling[0]
    lines = [line for line in text.rstrip().splitlines() if line.strip(" ^~")]
    return path, lines[-TRACEBACK_LINES:]


def end_of(path: Path, most_bytes: int = _TAIL_BYTES) -> str:
    """The last part of a log, whatever it holds."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most_bytes))
        return file.read().decode(errors="replace")
