"""The data behind the figures: every run by itself, and the mean over seeds on a common grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import align
from analysis.align import Array
from analysis.load import Sweep
from analysis.summary import Schedule, is_cut

Dataset = dict[str, list[Any]]  # column -> values, all of one length

GRID = 200  # points of a mean curve
POINTS_PER_LINE = 400  # of a single run
POINTS_IN_ALL = 6_000  # of all runs together: keeps the page small when there are many
SMOOTHING = 0.02  # width of the training loss's window, as a share of the axis
MEDIAN_SHARE = 0.05  # width of the noise scale's window, as a share of its measurements

AXES = ("tokens", "step", "time")


@dataclass(frozen=True)
class Curve:
    """One quantity of one run over the three axes."""

    schedule: str
    seed: str
    finished: bool
    x: dict[str, Array]
    y: Array


def of(sweep: Sweep, schedules: Sequence[Schedule], column: str) -> list[Curve]:
    """The runs that recorded `column`, finished or not."""
    found = []
    for schedule in schedules:
        for run in schedule.runs:
            rows = sweep.record.filter((pl.col("point") == run.point) & pl.col(column).is_not_null())
            if column == "batch/size" and len(rows) and is_cut(rows):
                rows = rows[:-1]
            if column == "stat/noise_scale":
                rows = rows.filter(pl.col(column).is_finite())
            if len(rows):
                x = {axis: rows[axis].to_numpy() for axis in AXES}
                y = rows[column].to_numpy()
                if column == "stat/noise_scale":
                    y = align.running_median(y, 2 * int(MEDIAN_SHARE * len(y) / 2) + 1)
                done = run.point in schedule.numbers
                found.append(Curve(schedule.label, run.seed, done, x, y))
    return found


def run_lines(lines: Sequence[Curve], axes: Sequence[str]) -> Dataset:
    """Every run by itself, thinned for drawing."""
    points = max(50, min(POINTS_PER_LINE, POINTS_IN_ALL // max(len(lines), 1)))
    out: Dataset = {key: [] for key in ("schedule", "run", *axes, "y")}
    for line in lines:
        kept = align.thin(line.y, points)
        out["schedule"] += [line.schedule] * len(kept)
        out["run"] += [f"{line.schedule}, seed {line.seed}"] * len(kept)
        for axis in axes:
            out[axis] += _short(line.x[axis][kept])
        out["y"] += _short(line.y[kept])
    return out


Resample = Callable[[Array, Array, Array], Array]


def mean_lines(lines: Sequence[Curve], axes: Sequence[str], resample: Resample, exact: bool) -> Dataset:
    """The mean over the finished runs of each schedule on grids common to them, one per axis.

    exact: the grid is every point of every run, for curves of few points.
    """
    out: Dataset = {key: [] for key in ("schedule", "axis", "x", "y", "seeds")}
    for label in dict.fromkeys(line.schedule for line in lines if line.finished):
        group = [line for line in lines if line.schedule == label and line.finished]
        for axis in axes:
            xs = [line.x[axis] for line in group]
            grid = align.shared_points(xs) if exact else align.uniform_grid(xs, GRID)
            if not len(grid):
                continue
            mean = np.mean([resample(x, line.y, grid) for x, line in zip(xs, group, strict=True)], axis=0)
            out["schedule"] += [label] * len(grid)
            out["axis"] += [axis] * len(grid)
            out["x"] += _short(grid)
            out["y"] += _short(mean)
            out["seeds"] += [len(group)] * len(grid)
    return out


def smooth(x: Array, y: Array, grid: Array) -> Array:
    return align.window_mean(x, y, grid, SMOOTHING * float(x[-1]))


def final_points(schedules: Sequence[Schedule]) -> Dataset:
    """Steps and final validation loss of every finished run."""
    out: Dataset = {key: [] for key in ("schedule", "run", "step", "y")}
    for schedule in schedules:
        for run in schedule.finished:
            numbers = schedule.numbers[run.point]
            out["schedule"].append(schedule.label)
            out["run"].append(f"{schedule.label}, seed {run.seed}")
            out["step"].append(numbers.steps)
            out["y"] += _short([numbers.val_loss])
    return out


def final_means(schedules: Sequence[Schedule]) -> Dataset:
    """Per schedule: mean steps, mean loss with its interval, whether no other is better in both, and where
    its label goes: towards the middle of the figure, every second one below its point."""
    found = [(s, s.mean("steps"), s.val_loss) for s in schedules]
    known = [(s, x, loss) for s, x, loss in found if x and loss and np.isfinite(loss.mean)]
    known.sort(key=lambda item: item[1])
    out: Dataset = {
        key: [] for key in ("schedule", "step", "y", "low", "high", "seeds", "front", "left", "below")
    }
    for place, (schedule, steps, loss) in enumerate(known):
        beaten = any(
            x <= steps and other.mean <= loss.mean and (x, other.mean) != (steps, loss.mean)
            for _, x, other in known
        )
        row = (schedule.label, steps, loss.mean, loss.low, loss.high, loss.n, not beaten)
        left = steps**2 > known[0][1] * known[-1][1]  # right of the middle of a logarithmic axis
        for column, value in zip(out.values(), (*row, left, place % 2 == 1), strict=True):
            column.append(value)
    return out


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True)]


def _short(values: Sequence[float | None] | Array) -> list[float | int | None]:
    """Five significant digits, which no screen resolves; whole numbers stay whole, NaN becomes null."""
    out: list[float | int | None] = []
    for value in values:
        if value is None or not np.isfinite(value):
            out.append(None)
        else:
            number = float(value)
            out.append(int(number) if number.is_integer() else float(f"{number:.5g}"))
    return out
