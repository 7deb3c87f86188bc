"""The numbers of a report as tables and as JSON."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from analysis.load import Run
from analysis.report import Report
from analysis.statistics import Estimate, Interval
from analysis.summary import RunNumbers, Schedule
from analysis.verdict import Comparison


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
        **{field: getattr(numbers, field, None) for field in RunNumbers.__dataclass_fields__},
        "host": status.host if status else None,
        "started": status.started if status else None,
        "updated": status.updated if status else None,
        "problem": run.problem,
    }


def schedules_table(report: Report) -> pl.DataFrame:
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
    }


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
        "runs": [{**_run_row(report, run), "axes": run.axes} for run in report.sweep.runs],
        "figures": [f"figures/{figure.name}.png" for figure in report.figures],
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
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
