"""The validation losses of the runs that ended over everything that they can be compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis import align
from analysis import numbers as text
from analysis.align import Array
from analysis.load import Run, Sweep
from analysis.summary import Schedule
from pipeline.config import common_unit


@dataclass(frozen=True)
class Axis:
    """What runs are compared at equal amounts of; `number` and `unit` say how much, in words."""

    name: str
    title: str
    number: Callable[[float], str]
    unit: str

    def amount(self, value: float) -> str:
        return f"{self.number(value)}{self.unit}"


TOKENS = Axis("tokens", "tokens", lambda value: text.compact(value, 3), " tokens")
STEPS = Axis("steps", "optimizer steps", lambda value: f"{value:,.0f}", " steps")
TIME = Axis("time", "training time", text.duration, "")
FLOPS = Axis("flops", "FLOPs", text.flops, "")
AXES = (TOKENS, STEPS, TIME, FLOPS)

# Of labelled samples.
SAMPLES = Axis("tokens", "samples", lambda value: text.compact(value, 3), " samples")
EPOCHS = Axis(
    "epochs", "full gradient evaluations", lambda value: text.compact(value, 3), " full gradient evaluations"
)
AXES_OF_SAMPLES = (SAMPLES, STEPS, TIME, EPOCHS)

_COLUMNS = {"tokens": "tokens", "steps": "step", "time": "time", "epochs": "epochs"}


def axes_of(schedules: Sequence[Schedule]) -> tuple[Axis, ...]:
    """What they are compared at: the first is what all budgets count, the last what an update costs."""
    return AXES_OF_SAMPLES if common_unit(s.unit for s in schedules) == "samples" else AXES


@dataclass(frozen=True)
class Evaluations:
    """Those of one run, in the order of training. `at`: where they were made, by the name of the axis,
    without the axes that the run says nothing about: the time where its log has none, FLOPs where it has no
    config."""

    seed: str
    host: str | None
    loss: Array
    at: dict[str, Array]
    rows: dict[str, tuple[Array, Array]]  # of the same axes at all rows of the record: place and tokens

    def loss_at(self, axis: Axis, place: float) -> float:
        """Linear between two evaluations; NaN outside of them."""
        return float(align.interpolate(self.at[axis.name], self.loss, np.array([place]))[0])

    def progress_at(self, axis: Axis, place: float) -> float:
        """The share of the run that lies before; all of it where the run ends at 0."""
        end = float(self.rows[axis.name][0][-1])
        return place / end if end > 0 else 1.0

    def tokens_at(self, axis: Axis, place: float) -> float:
        """NaN where the record holds no tokens."""
        x, tokens = self.rows[axis.name]
        return float(align.interpolate(x, tokens, np.array([place]))[0])


def evaluations(sweep: Sweep, schedules: Sequence[Schedule]) -> dict[str, list[Evaluations]]:
    """By schedule, those of its finished runs that were evaluated at all, and of its broken ones, whose loss
    is NaN where they end."""
    return {
        schedule.label: [
            found
            for run in (*schedule.finished, *schedule.broken)
            if run.point in sweep.rows
            and (found := _evaluations(run, sweep.rows[run.point], run in schedule.broken)) is not None
        ]
        for schedule in schedules
    }


def _evaluations(run: Run, rows: pl.DataFrame, broken: bool) -> Evaluations | None:
    losses, evaluated = rows["val/loss"].to_numpy(), rows["val/loss"].is_not_null().to_numpy()
    if broken:
        losses, evaluated = losses.copy(), evaluated.copy()
        losses[-1], evaluated[-1] = np.nan, True
    if not evaluated.any():
        return None
    tokens = rows["tokens"].to_numpy()
    along = {axis: rows[column].to_numpy() for axis, column in _COLUMNS.items()}
    if run.flops_per_token:
        along["flops"] = tokens * run.flops_per_token
    known = {axis: x for axis, x in along.items() if _rises(x[np.isfinite(x)], x[evaluated])}
    return Evaluations(
        seed=run.seed,
        host=run.status.host if run.status else None,
        loss=losses[evaluated],
        at={axis: x[evaluated] for axis, x in known.items()},
        rows={axis: (x[np.isfinite(x)], tokens[np.isfinite(x)]) for axis, x in known.items()},
    )


def _rises(recorded: Array, evaluated: Array) -> bool:
    """Whether losses can be placed along it: each evaluation has a place, and none lies before an earlier."""
    return bool(np.isfinite(evaluated).all() and (np.diff(recorded) >= 0).all())
