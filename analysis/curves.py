"""The data behind the figures: every run by itself, and the mean over seeds on a common grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from analysis import align
from analysis.align import Array
from analysis.load import Run, Sweep
from analysis.projection import Projection
from analysis.summary import Schedule, comparable, is_cut

Dataset = dict[str, list[Any]]  # column -> values, all of one length

# Of one figure's lines: so many points each, and so many together, which keeps the page small when there are
# many lines, but never too few to show a shape.
POINTS_PER_MEAN, POINTS_OF_MEANS = 200, 4_000
POINTS_PER_LINE, POINTS_OF_LINES = 400, 5_000
FEWEST_POINTS = 50
SMOOTHING = 0.02  # width of the training loss's window, as a share of the axis
MEDIAN_SHARE = 0.05  # width of the noise scale's window, as a share of its measurements

RATE_WINDOW = 0.02  # width of the throughput's window, as a share of the run's training time

AXES = ("epochs", "tokens", "step", "time", "flops")


@dataclass(frozen=True)
class Curve:
    """One quantity of one run over every axis that is known of it."""

    schedule: str
    seed: str
    finished: bool
    x: dict[str, Array]
    y: Array


@dataclass(frozen=True)
class Trace:
    """The rows of one run, finished or not, and where it stands."""

    schedule: str
    run: Run
    finished: bool
    rows: pl.DataFrame

    def curve(self, rows: pl.DataFrame, y: Array) -> Curve:
        """`y` over the axes: of `rows`, which belong to this run."""
        x = {axis: rows[axis].to_numpy() for axis in ("tokens", "step", "time")}
        if self.run.flops_per_token:
            x["flops"] = x["tokens"] * self.run.flops_per_token
        known = self.rows.filter(pl.col("epochs").is_not_null())
        if len(known):
            x["epochs"] = np.interp(x["tokens"], known["tokens"].to_numpy(), known["epochs"].to_numpy())
        return Curve(self.schedule, self.run.seed, self.finished, x, y)


def traces(sweep: Sweep, schedules: Sequence[Schedule]) -> list[Trace]:
    """The runs that recorded anything, in the order of their schedules."""
    return [
        Trace(schedule.label, run, run.point in schedule.numbers, sweep.rows[run.point])
        for schedule in schedules
        for run in schedule.runs
        if run.point in sweep.rows
    ]


def recorded(column: str) -> Callable[[Trace], Curve | None]:
    """A column as it was recorded."""
    return lambda trace: _curve(trace, trace.rows.filter(pl.col(column).is_not_null()), column)


def positive(column: str) -> Callable[[Trace], Curve | None]:
    """A column for a logarithmic axis: without what rounding has made 0 or less."""
    return lambda trace: _curve(trace, trace.rows.filter(pl.col(column) > 0), column)


def batch_size(trace: Trace) -> Curve | None:
    """Without the last step where it was cut to end on the budget."""
    rows = trace.rows.filter(pl.col("batch/size").is_not_null())
    return _curve(trace, rows[:-1] if len(rows) and is_cut(rows) else rows, "batch/size")


def noise_scale(trace: Trace) -> Curve | None:
    """Running median of `stat/noise_scale`, in sequences; None where nothing was measured."""
    rows = trace.rows.filter(pl.col("stat/noise_scale").is_finite())
    y = align.running_median(rows["stat/noise_scale"].to_numpy(), 2 * int(MEDIAN_SHARE * len(rows) / 2) + 1)
    return trace.curve(rows, y) if len(rows) else None


def throughput(trace: Trace) -> Curve | None:
    """Tokens per second over windows of training time: Δtokens/Δtime between their ends.

    From the two columns that every source has, whichever steps it has: a rate averaged over rows would count
    a short step as much as a long one.
    """
    columns = ("time", "tokens", "step")
    counted = (pl.col("time") > 0) & pl.col("time").is_finite() & pl.col("tokens").is_finite()
    # A step of no measured duration adds its tokens to the next.
    rows = trace.rows.select(columns).unique("time", keep="last", maintain_order=True)
    rows = pl.concat([pl.DataFrame({column: [0.0] for column in columns}), rows.filter(counted)])
    time = rows["time"].to_numpy()
    if len(rows) < 2:
        return None
    width = RATE_WINDOW * time[-1]
    ends = np.linspace(width, time[-1], round(2 / RATE_WINDOW) - 1)  # each overlaps half of the one before
    at = {column: np.interp(ends - width / 2, time, rows[column].to_numpy()) for column in columns}
    tokens = rows["tokens"].to_numpy()
    rate = (np.interp(ends, time, tokens) - np.interp(ends - width, time, tokens)) / width
    return trace.curve(pl.DataFrame(at), rate)


def _curve(trace: Trace, rows: pl.DataFrame, column: str) -> Curve | None:
    return trace.curve(rows, rows[column].to_numpy()) if len(rows) else None


def common_axes(lines: Sequence[Curve]) -> list[str]:
    """The axes that all lines have: of a run without a config the FLOPs are not known."""
    return [axis for axis in AXES if all(axis in line.x for line in lines)]


def run_lines(lines: Sequence[Curve], axes: Sequence[str]) -> Dataset:
    """Every run by itself, thinned for drawing."""
    points = _points(POINTS_PER_LINE, POINTS_OF_LINES, len(lines))
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
    labels = list(dict.fromkeys(line.schedule for line in lines if line.finished))
    points = _points(POINTS_PER_MEAN, POINTS_OF_MEANS, len(labels))
    for label in labels:
        group = [line for line in lines if line.schedule == label and line.finished]
        for axis in axes:
            if any(np.isnan(line.x[axis]).any() for line in group):  # nobody counted it
                continue
            xs = [line.x[axis] for line in group]
            grid = align.shared_points(xs) if exact else align.uniform_grid(xs, points)
            if not len(grid):
                continue
            mean = np.mean([resample(x, line.y, grid) for x, line in zip(xs, group, strict=True)], axis=0)
            out["schedule"] += [label] * len(grid)
            out["axis"] += [axis] * len(grid)
            out["x"] += _short(grid)
            out["y"] += _short(mean)
            out["seeds"] += [len(group)] * len(grid)
    return out


def _points(per_line: int, in_all: int, lines: int) -> int:
    return max(FEWEST_POINTS, min(per_line, in_all // max(lines, 1)))


def smooth(x: Array, y: Array, grid: Array) -> Array:
    """Means of y over windows of SMOOTHING of the axis, at the places of `grid`."""
    return align.window_mean(x, y, grid, SMOOTHING * float(x[-1]))


COSTS = {"step": "steps", "time": "seconds"}  # axis of the trade: what a schedule takes


def final_points(schedules: Sequence[Schedule]) -> Dataset:
    """Steps, training time and final validation loss of every finished run."""
    out: Dataset = {key: [] for key in ("schedule", "run", *COSTS, "y")}
    for schedule in schedules:
        for run in schedule.finished:
            numbers = schedule.numbers[run.point]
            out["schedule"].append(schedule.label)
            out["run"].append(f"{schedule.label}, seed {run.seed}")
            out["step"] += _short([numbers.steps])
            out["time"] += _short([numbers.seconds])
            out["y"] += _short([numbers.val_loss])
    return out


def final_means(schedules: Sequence[Schedule]) -> Dataset:
    """Per axis and schedule: mean cost, mean loss, its interval, and whether no other is better in both."""
    out: Dataset = {key: [] for key in ("schedule", "axis", "x", "y", "low", "high", "seeds", "front")}
    for axis, cost in COSTS.items():
        found = [(s, s.mean(cost), s.val_loss) for s in schedules]
        known = [(s, x, loss) for s, x, loss in found if x and loss and np.isfinite(loss.mean)]
        for schedule, x, loss in sorted(known, key=lambda item: item[1]):
            beaten = any(
                other_x <= x and other.mean <= loss.mean and (other_x, other.mean) != (x, loss.mean)
                for beater, other_x, other in known
                if comparable(beater, schedule)
            )
            row = (schedule.label, axis, x, loss.mean, loss.low, loss.high, loss.n, not beaten)
            for column, value in zip(out.values(), row, strict=True):
                column.append(value)
    return out


def projected(projection: Projection, number: Literal["seconds", "gpu_hours"]) -> Dataset:
    """A number that is forecast of each schedule, by the number of GPUs."""
    out: Dataset = {key: [] for key in ("schedule", "gpus", "y")}
    for outlook in projection.outlooks:
        for forecast in outlook.line:
            out["schedule"].append(outlook.schedule)
            out["gpus"].append(forecast.gpus)
            out["y"] += _short([getattr(forecast, number)])
    return out


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    """One object for each point, as Vega-Lite takes them."""
    return [dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True)]


def _short(values: Sequence[float | None] | Array) -> list[float | int | None]:
    """Five significant digits, which no screen resolves; whole numbers stay whole, NaN becomes null."""
    out: list[float | int | None] = []
    for value in values:
        if value is None or not np.isfinite(value):
            out.append(None)
        else:
            number = float(value)
            exact = number.is_integer() and abs(number) < 2**53
            out.append(int(number) if exact else float(f"{number:.5g}"))
    return out
