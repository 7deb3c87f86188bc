"""The numbers of a report as tables and as JSON."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from analysis import lau
from analysis.equal import Equal
from analysis.load import Run
from analysis.projection import Projection, projection_table
from analysis.report import Report
from analysis.statistics import Estimate, Interval
from analysis.summary import MORE, RunNumbers, Schedule
from analysis.target import Reach, Target
from analysis.verdict import Comparison, Overall


def tables(report: Report) -> dict[str, pl.DataFrame]:
    """By name, every number in full precision. What a sweep has none of, such as comparisons, is left out."""
    found = {
        "schedules": schedules_table(report),
        "runs": runs_table(report),
        "equal": equal_table(report),
        "targets": targets_table(report),
        "projection": projection_table(report.projection),
        "lau_table": lau_table(report),
    }
    return {name: table for name, table in found.items() if not table.is_empty()}


def runs_table(report: Report) -> pl.DataFrame:
    """One row per point, finished or not."""
    return pl.DataFrame([_run_row(report, run) for run in report.sweep.runs], infer_schema_length=None)


def _run_row(report: Report, run: Run) -> dict[str, Any]:
    numbers, status = report.numbers_of(run), run.status
    return {
        "run": run.id,
        **{axis: run.axes.get(axis) for axis in report.sweep.axes},
        "schedule": report.label_of(run),
        "state": report.state_of(run),
        "attempt": status.attempt if status else None,
        "budget_tokens": run.config.budget_tokens if run.config else None,
        **{
            field: getattr(numbers, field, None)
            for field in RunNumbers.__dataclass_fields__
            if field not in MORE or field in report.more
        },
        "host": status.host if status else None,
        "started": status.started if status else None,
        "updated": status.updated if status else None,
        "problem": run.problem,
    }


def schedules_table(report: Report) -> pl.DataFrame:
    """One row for each schedule."""
    return pl.DataFrame([_schedule_row(report, s) for s in report.schedules], infer_schema_length=None)


def _schedule_row(report: Report, schedule: Schedule) -> dict[str, Any]:
    comparison = report.comparison_of(schedule)
    return {
        "schedule": schedule.label,
        "baseline": report.is_baseline(schedule),
        "runs": len(schedule.runs),
        "finished": len(schedule.finished),
        "diverged": schedule.diverged,
        **{field: schedule.mean(field) for field in ("steps", "tokens", "mean_batch", "final_batch")},
        **_estimate_fields("train_loss", schedule.train_loss),
        **_estimate_fields("val_loss", schedule.val_loss),
        **_estimate_fields("val_loss_iqm", schedule.val_loss_iqm),
        **_test_fields(comparison),
        "verdict": comparison.kind if comparison else None,
        "tokens_per_second": schedule.mean("tokens_per_second"),
        "seconds": schedule.mean("seconds"),
        **{name: schedule.mean(name) for name in report.more},
    }


def equal_table(report: Report) -> pl.DataFrame:
    """One row per axis and comparison; `place`: where on the axis, in tokens, steps, seconds or FLOPs."""
    return pl.DataFrame([_equal_row(equal) for equal in report.equal], infer_schema_length=None)


def _equal_row(equal: Equal) -> dict[str, Any]:
    tokens, progress = equal.tokens or (None, None), equal.progress or (None, None)
    return {
        "axis": equal.axis.name,
        "schedule": equal.schedule,
        "baseline": equal.baseline,
        "place": equal.place,
        "verdict": equal.kind,
        **_estimate_fields("loss", equal.loss),
        **_estimate_fields("baseline_loss", equal.baseline_loss),
        **_estimate_fields("difference", equal.difference),
        "p": equal.p,
        "p_adjusted": equal.p_adjusted,
        "seeds": len(equal.seeds),
        "tokens": tokens[0],
        "baseline_tokens": tokens[1],
        "progress": progress[0],
        "baseline_progress": progress[1],
        "hosts": equal.hosts,
    }


def targets_table(report: Report) -> pl.DataFrame:
    """One row per target, axis and schedule; `cost`: in tokens, steps, seconds or FLOPs."""
    rows = [_reach_row(reach) for target in report.targets for reach in target.reaches]
    return pl.DataFrame(rows, infer_schema_length=None)


def _reach_row(reach: Reach) -> dict[str, Any]:
    reached = [cost.reached for cost in reach.costs]
    return {
        "target": reach.target,
        "axis": reach.axis.name,
        "schedule": reach.schedule,
        "baseline": reach.baseline,
        "runs": len(reached),
        "reached": len(reached) - reached.count("not"),
        "before_first_evaluation": reached.count("before"),
        **_estimate_fields("cost", reach.mean),
        **_estimate_fields("speedup", reach.ratio),
        "pairs": reach.speedup.n if reach.speedup else None,
        "p": reach.p,
        "p_adjusted": reach.p_adjusted,
        "verdict": reach.kind,
    }


def _target_fields(target: Target) -> dict[str, Any]:
    return {
        "loss": target.loss,
        "why": target.why,
        "baseline": target.baseline,
        "schedules": [
            {**_reach_row(reach), "costs": [vars(cost) for cost in reach.costs]} for reach in target.reaches
        ],
    }


def _overall_fields(overall: Overall) -> dict[str, Any]:
    return {
        "schedule": overall.schedule,
        "against": overall.against,
        **_estimate_fields("change", overall.change),
        "pairs": overall.pairs,
    }


def _projection_fields(projection: Projection, notes: list[str]) -> dict[str, Any]:
    return {
        "network": vars(projection.network),
        "given": projection.given,
        "schedules": projection_table(projection).to_dicts(),
        "missing": projection.missing,
        "checks": [{**vars(check), "error": check.error} for fit in projection.fits for check in fit.checks],
        "notes": notes,
    }


def lau_table(report: Report) -> pl.DataFrame:
    """The columns of Lau et al. 2024, Tables 1 to 3, row by row as there (analysis.lau)."""
    rows = [
        {
            "model": block.model,
            "schedule": row.name,
            "steps": row.schedule.mean("steps"),
            "mean_batch": row.schedule.mean("mean_batch"),
            "hours": row.hours,
            **_estimate_fields("train_loss", row.schedule.train_loss),
            **_estimate_fields("val_loss", row.schedule.val_loss),
        }
        for block in lau.blocks(report.schedules)
        for row in block.rows
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _test_fields(comparison: Comparison | None) -> dict[str, Any]:
    return {
        **_estimate_fields("difference", comparison.difference if comparison else None),
        "p": comparison.p if comparison else None,
        "p_adjusted": comparison.p_adjusted if comparison else None,
        **_estimate_fields("improvement", comparison.improvement if comparison else None),
    }


def _estimate_fields(name: str, estimate: Estimate | Interval | None) -> dict[str, Any]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def to_json(report: Report) -> dict[str, Any]:
    """Every number of the report, in full precision; NaN and infinities as the record writes them."""
    content = {
        "sweep": report.sweep.name,
        "command": report.sweep.command,
        "source": report.sweep.source.name,
        "written": report.written,
        "finished": len(report.finished),
        "runs_in_all": len(report.runs),
        "resume": report.resume,
        "headline": report.headline,
        "verdicts": [comparison.sentence for comparison in report.comparisons],
        "cautions": report.cautions,
        "baseline": report.baseline,
        "settings": dict(report.settings),
        "schedules": [
            {
                **_schedule_row(report, s),
                "axes": s.axes,
                "settings": s.settings,
                "seeds": list(s.by_seed("steps")),
            }
            for s in report.schedules
        ],
        "comparisons": [_comparison_fields(comparison) for comparison in report.comparisons],
        "equal": [{**_equal_row(equal), "paired_seeds": list(equal.seeds)} for equal in report.equal],
        "targets": [_target_fields(target) for target in report.targets],
        "overall": [_overall_fields(overall) for overall in report.overall],
        "runs": [{**_run_row(report, run), "axes": run.axes} for run in report.sweep.runs],
        "tables": [f"tables/{name}.csv" for name in tables(report)],
        "projection": _projection_fields(report.projection, report.projection_notes),
        "figures": [
            f"figures/{figure.name}.{kind}" for figure in report.figures for kind in ("png", "svg", "pdf")
        ],
    }
    found: dict[str, Any] = plain(content)
    return found


def _comparison_fields(comparison: Comparison) -> dict[str, Any]:
    steps, seconds = comparison.steps or (None, None), comparison.seconds or (None, None)
    return {
        "schedule": comparison.schedule,
        "baseline": comparison.baseline,
        "verdict": comparison.kind,
        "seeds": comparison.seeds,
        **_test_fields(comparison),
        "steps": steps[0],
        "baseline_steps": steps[1],
        "seconds": seconds[0],
        "baseline_seconds": seconds[1],
    }


def plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinities by their names, as in the record."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
