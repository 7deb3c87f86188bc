"""The tables of a report as a reader sees them: the numbers as in report.md, in LaTeX.

Bold is the lowest value of a column, and only where it can be told from every other it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from analysis import lau
from analysis import numbers as text
from analysis.equal import Equal
from analysis.latex import Strong, tabular
from analysis.report import Report
from analysis.statistics import Estimate, Interval, clearly_lowest
from analysis.summary import Schedule
from analysis.target import Reach

Blocks = list[tuple[str, list[list[str]]]]


def latex(report: Report) -> dict[str, str]:
    """LaTeX by name of the table; none without a row."""
    made = {
        "schedules": tabular((*_SCHEDULES, *report.more.values()), _schedules(report), 1),
        "runs": tabular(_RUNS, _runs(report), 4),
        "equal": tabular(_EQUAL, _equal(report), 3),
        "targets": tabular(_TARGETS, _targets(report), 2),
        "projection": tabular(_PROJECTION, _projection(report), 1),
        "lau_table": tabular(LAU, lau_blocks(report), 1),
    }
    return {name: source for name, source in made.items() if source.count(r"\midrule")}


def estimate(found: Estimate | None) -> str:
    """2.345 ± 0.012"""
    return text.MISSING if found is None else text.with_interval(found.mean, found.half_width)


def difference(found: Estimate | None) -> str:
    """+0.012 ± 0.003, with what is no finite number as missing."""
    if found is None or not math.isfinite(found.mean):
        return text.MISSING
    return text.signed_with_interval(found.mean, found.half_width)


def speedup(found: Interval | None) -> str:
    """1.23 [1.10, 1.35]"""
    return text.MISSING if found is None else text.ratio(found.mean, found.low, found.high)


def measure(name: str, value: float | None) -> str:
    """Of a field of analysis.summary.MORE."""
    if name.startswith(("val_accuracy", "val_auc")):
        return text.percent(value)
    if name == "val_loss_averaged":
        return text.fixed(value)
    return text.compact(value, 3) if name in ("gradients", "losses") else text.small(value)


# --- schedules and runs ----------------------------------------------------------------------------------

_SCHEDULES = (
    "schedule",
    "validation loss",
    "difference to baseline",
    "p, corrected",
    "steps",
    "mean batch",
    "training loss",
    "training time",
    "runs",
)


def _schedules(report: Report) -> Blocks:
    lowest = _lowest(report.schedules)
    rows = []
    for s in report.schedules:
        compared = report.comparison_of(s)
        baseline = " (baseline)" if report.is_baseline(s) else ""
        rows.append(
            [
                f"{s.label}{baseline}",
                lowest(s, "val_loss", estimate(s.val_loss)),
                difference(compared.difference if compared else None),
                text.probability(compared.p_adjusted if compared else None),
                text.count(s.mean("steps")),
                text.count(s.mean("mean_batch")),
                lowest(s, "train_loss", estimate(s.train_loss)),
                lowest(s, "seconds", text.duration(s.mean("seconds"))),
                f"{len(s.finished)}/{len(s.runs)}",
                *(measure(name, s.mean(name)) for name in report.more),
            ]
        )
    return [("", rows)]


def _lowest(schedules: Sequence[Schedule]) -> Callable[[Schedule, str, str], str]:
    """Makes a cell bold where its schedule has the lowest number of all that are alike but for the batch."""

    groups: dict[Hashable, list[Schedule]] = {}
    for schedule in schedules:
        alike = (schedule.rest, tuple(schedule.task.items()), frozenset(schedule.budgets))
        groups.setdefault(alike, []).append(schedule)
    lowest = {
        (number, clearly_lowest({s.label: s.by_seed(number) for s in group if s.finished}))
        for group in groups.values()
        for number in ("val_loss", "train_loss", "seconds")
    }
    return lambda schedule, number, cell: Strong(cell) if (number, schedule.label) in lowest else cell


_RUNS = (
    "run",
    "schedule",
    "seed",
    "state",
    "steps",
    "training loss",
    "validation loss",
    "training time",
)


def _runs(report: Report) -> Blocks:
    rows = []
    for run in report.sweep.runs:
        n = report.numbers_of(run)
        rows.append(
            [
                run.id or text.MISSING,
                report.label_of(run),
                run.seed,
                report.state_of(run),
                text.count(n.steps if n else None),
                text.fixed(n.train_loss if n else None),
                text.fixed(n.val_loss if n else None),
                text.duration(n.seconds if n else None),
            ]
        )
    return [("", rows)]


# --- at equal tokens, steps, time; to a target -----------------------------------------------------------

_EQUAL = ("schedule", "baseline", "verdict", "at", "loss", "loss of baseline", "difference", "p, corrected")


def _equal(report: Report) -> Blocks:
    blocks: Blocks = []
    for axis in report.axes:
        rows = [_equal_row(equal) for equal in report.equal if equal.axis is axis]
        if rows:
            blocks.append((f"at equal {axis.title}", rows))
    return blocks


def _equal_row(equal: Equal) -> list[str]:
    own, other = estimate(equal.loss), estimate(equal.baseline_loss)
    return [
        equal.schedule,
        equal.baseline or text.MISSING,
        equal.kind,
        equal.where or text.MISSING,
        Strong(own) if equal.kind == "better" else own,
        Strong(other) if equal.kind == "worse" else other,
        difference(equal.difference),
        text.probability(equal.p_adjusted),
    ]


_TARGETS = ("schedule", "verdict", "to the target", "speed-up", "p, corrected")


def _targets(report: Report) -> Blocks:
    return [
        (f"{axis.title} to validation loss {text.fixed(target.loss)}", rows)
        for target in report.targets
        for axis in report.axes
        if (rows := [_reach_row(reach) for reach in target.of(axis)])
    ]


def _reach_row(reach: Reach) -> list[str]:
    ratio = speedup(reach.ratio)
    return [
        reach.schedule,
        reach.kind or "baseline",
        reach.words,
        Strong(ratio) if reach.kind == "sooner" else ratio,
        text.probability(reach.p_adjusted),
    ]


# --- on other numbers of GPUs ----------------------------------------------------------------------------

_PROJECTION = ("schedule", "GPUs", "training time", "GPU-hours", "speed-up")


def _projection(report: Report) -> Blocks:
    rows = [
        [
            outlook.schedule,
            f"{forecast.gpus:,}",
            text.duration(forecast.seconds),
            text.compact(forecast.gpu_hours, 3),
            text.MISSING if forecast.speedup is None else f"{forecast.speedup:.2g}×",
        ]
        for outlook in report.projection.outlooks
        for forecast in outlook.forecasts
    ]
    return [("", rows)] if rows else []


# --- Lau et al. 2024 -------------------------------------------------------------------------------------

LAU = ("schedule", "steps", "batch size", "time (h)", "training loss", "validation loss")


def lau_blocks(report: Report) -> Blocks:
    """The rows of Lau et al. 2024, Table 1, of each model."""
    lowest = _lowest(report.schedules)
    return [
        (
            block.model,
            [
                [
                    row.name,
                    text.count(row.schedule.mean("steps")),
                    text.count(row.schedule.mean("mean_batch")),
                    lowest(row.schedule, "seconds", _hours(row.hours)),
                    lowest(row.schedule, "train_loss", estimate(row.schedule.train_loss)),
                    lowest(row.schedule, "val_loss", estimate(row.schedule.val_loss)),
                ]
                for row in block.rows
            ],
        )
        for block in lau.blocks(report.schedules)
    ]


def _hours(hours: float | None) -> str:
    """As the papers: 9.31; of a run of seconds three digits."""
    if hours is None or not 0 < hours < math.inf:
        return text.fixed(hours, 2)
    return text.fixed(hours, max(2, 2 - math.floor(math.log10(hours))))


def lau_markdown(report: Report) -> str:
    """Those rows as a table of Markdown."""
    lines = [f"| {' | '.join(LAU)} |", "|:--|--:|--:|--:|--:|--:|"]
    for model, rows in lau_blocks(report):
        lines.append(f"| *{markdown_cell(model)}* |{' |' * (len(LAU) - 1)}")
        lines += [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows]
    return "\n".join([*lines, ""])


def markdown_cell(cell: object) -> str:
    """In one line, with what would end a cell or begin an element escaped."""
    words = " ".join(str(cell).split()).replace("<", "&lt;").replace("|", "\\|")
    return f"**{words}**" if isinstance(cell, Strong) else words
