"""How every screen of the launchers looks: columns that fit the terminal, numbers with units."""

from __future__ import annotations

import functools
import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import track
from rich.text import Text

from pipeline.store import python

REFUSED = 3  # the exit code when a question is not answered with yes
GAP = 2
DASH = "–"  # no value
STYLES = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "invalid": "red",
    "lost": "yellow",
    "preempted": "yellow",
    "cancelled": "yellow",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A title and a cell for each row."""

    title: str
    cells: Sequence[str]
    align: Literal["left", "right"] = "right"
    optional: int = 0  # 0: always shown; else the highest number goes first when the screen is narrow

    @functools.cached_property
    def width(self) -> int:
        return max(len(text) for text in (self.title, *self.cells))


def fit(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit, optional ones left out from the highest number down."""
    kept = list(columns)
    while total_width(kept) > width and (optional := [c for c in kept if c.optional]):
        kept.remove(max(optional, key=lambda column: column.optional))
    return kept


def total_width(columns: Sequence[Column]) -> int:
    """In characters, with the gaps."""
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def table(columns: Sequence[Column], width: int) -> Text:
    """Aligned lines, a title first, each at most `width` characters; states in colour."""
    columns = fit(columns, width)
    text = Text(no_wrap=True, overflow="ellipsis")
    for row in range(-1, len(columns[0].cells)):
        cells = [column.title if row < 0 else column.cells[row] for column in columns]
        padded = [
            cell.ljust(column.width) if column.align == "left" else cell.rjust(column.width)
            for cell, column in zip(cells, columns, strict=True)
        ]
        line = (" " * GAP).join(padded).rstrip()
        if len(line) > width:
            line = line[: width - 1] + "…"
        start = len(text)
        text.append(line + "\n", style="bold" if row < 0 else "")
        for cell in cells:
            if row >= 0 and cell in STYLES:
                offset = start + line.find(cell)
                text.stylize(STYLES[cell], offset, offset + len(cell))
    text.right_crop(1)
    return text


def axis_columns(axes: Sequence[str], points: Sequence[Mapping[str, str]]) -> list[Column]:
    """One column for each axis; a value that has no part in the result of a point is a dash."""
    leaves = [axis.rpartition(".")[2] for axis in axes]
    titles = [leaf if leaves.count(leaf) == 1 else axis for axis, leaf in zip(axes, leaves, strict=True)]
    return [
        Column(title, [point.get(axis, DASH) for point in points], "left")
        for axis, title in zip(axes, titles, strict=True)
    ]


def name_points(points: Sequence[Mapping[str, str]]) -> str:
    """`batch=stages seed=0,1` where the points are all combinations of their values, else one by one."""
    axes = list(dict.fromkeys(axis for point in points for axis in point))
    values = {axis: list(dict.fromkeys(point.get(axis, DASH) for point in points)) for axis in axes}
    if math.prod(len(each) for each in values.values()) == len(points):
        return " ".join(f"{axis}={','.join(each)}" for axis, each in values.items())
    return "; ".join(" ".join(f"{axis}={value}" for axis, value in point.items()) for point in points)


def make_console(*, stderr: bool = False) -> Console:
    """Shows text as it is: no markup, no colours that nobody asked for."""
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


def screen_width(console: Console) -> int:
    """Characters a line may have; a file or a pipe takes whole lines."""
    return console.width if console.is_terminal else 1000


def say(console: Console, *lines: str, style: str = "") -> None:
    """Prints sentences, wrapped on a terminal, whole elsewhere."""
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(
            line,
            screen_width(console),
            subsequent_indent=indent + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        console.print("\n".join(wrapped), style=style, soft_wrap=True)


def show_command(console: Console, label: str, command: str) -> None:
    """A command to copy: one line whatever the width, so that nothing breaks it."""
    console.print(Text(f"{label}: ", "bold") + Text(command), soft_wrap=True)


def show_launchers(console: Console, name: str, *commands: str) -> None:
    """These commands of the launchers about a sweep or a run."""
    for command in commands:
        show_command(console, command, shlex.join([python(), "-m", "launchers", command, name]))


def confirm(console: Console, question: str) -> bool:
    """Asks on the terminal; anything but yes is no."""
    return console.input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def progress(items: Sequence[T], label: str) -> Iterable[T]:
    """Shows a bar on a terminal while the items are consumed, and nothing of it remains."""
    console = make_console(stderr=True)
    return track(items, label, console=console, transient=True, disable=not console.is_terminal)


def count(number: float) -> str:
    """Three digits and a unit: 800k, 1.25M, 2B."""
    for unit, scale in (("", 1), ("k", 1e3), ("M", 1e6), ("B", 1e9)):
        if number < 999.5 * scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number / 1e12:.3g}T"


def duration(seconds: float) -> str:
    """0:42, 12:05, 3:20:00, 4d 03h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def or_blank(show: Callable[[float], str], value: float | None) -> str:
    """Of what is not known, a blank."""
    return "" if value is None else show(value)


def tally(states: Iterable[str], notes: dict[str, str]) -> str:
    """`6 new, 2 done (skipped)`."""
    counts = Counter(states)
    remarks = {name: f" ({note})" for name, note in notes.items()}
    return ", ".join(f"{number} {name}{remarks.get(name, '')}" for name, number in counts.items())
