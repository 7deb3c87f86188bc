"""Renders a comparison: report.html, report.md, report.json, runs.csv, schedules.csv and the figures.

`build` decides everything; the writers below only put it into words and files, all from the same objects.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import vl_convert

from analysis import figures as charts
from analysis import look, panels
from analysis import numbers as text
from analysis import settings as facts
from analysis.curves import Dataset
from analysis.figures import Figure
from analysis.load import Run, Sweep
from analysis.statistics import BOOTSTRAP_SEEDS, Estimate, Interval
from analysis.summary import RunNumbers, Schedule, run_numbers, summarise
from analysis.verdict import Comparison, cautions, compare_all, headline, is_baseline, parse_baseline
from pipeline.store import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    sweep: Sweep
    written: float  # Unix seconds
    numbers: dict[int, RunNumbers]  # by point, whatever the run's state
    schedules: list[Schedule]
    baseline: dict[str, str]
    comparisons: list[Comparison]
    headline: str
    cautions: list[str]
    settings: facts.Facts
    figures: list[Figure]
    datasets: dict[str, Dataset]

    @property
    def runs(self) -> list[Run]:
        """All that count or are to come: without the superseded."""
        return sorted((run for s in self.schedules for run in s.runs), key=lambda run: run.point)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "DONE"]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.state != "DONE"]

    @property
    def labels(self) -> list[str]:
        return [schedule.label for schedule in self.schedules]

    @property
    def commands(self) -> list[str]:
        """All that asked for points of the sweep, which may have grown by several."""
        return _joined(self.sweep.runs) or [shlex.join(self.sweep.command)]

    @property
    def resume(self) -> list[str]:
        """The commands that asked for what is missing: issued again, they do no more than that.

        A refused point would be refused again.
        """
        return _joined([run for run in self.unfinished if run.state != "INVALID"])

    def label_of(self, run: Run) -> str:
        return next(s.label for s in self.schedules if run in s.runs or run in s.superseded)

    def state_of(self, run: Run) -> str:
        return "SUPERSEDED" if any(run in s.superseded for s in self.schedules) else run.state

    def numbers_of(self, run: Run) -> RunNumbers | None:
        return self.numbers.get(run.point)

    def comparison_of(self, schedule: Schedule) -> Comparison | None:
        return next((c for c in self.comparisons if c.schedule == schedule.label), None)

    @property
    def tested(self) -> bool:
        """Whether any comparison has a p-value."""
        return any(comparison.p is not None for comparison in self.comparisons)

    @property
    def enough_seeds(self) -> bool:
        """Whether any schedule has enough for an interquartile mean."""
        return any(schedule.val_loss_iqm for schedule in self.schedules)

    @property
    def methods(self) -> list[str]:
        """What the columns about chance hold, in sentences."""
        found = []
        if self.tested:
            found += [
                "p: paired t-test of the difference, corrected for all comparisons of the sweep (Holm).",
                "Probability of improvement: the share of seeds that end lower than with the baseline, a tie "
                "as half a seed, with its exact 95% interval.",
            ]
        if self.tested or self.enough_seeds:
            found.append(
                f"Interquartile mean: of the middle half of the seeds, with its 95% bootstrap interval, from "
                f"{BOOTSTRAP_SEEDS} seeds on; of fewer, such an interval misses far too often (of 2 every "
                f"other time)."
            )
        return found

    def is_baseline(self, schedule: Schedule) -> bool:
        return is_baseline(schedule, self.baseline)


def _joined(runs: Sequence[Run]) -> list[str]:
    """The distinct commands of the runs, as typed."""
    return list(dict.fromkeys(shlex.join(run.command) for run in runs))


def build(sweep: Sweep, baseline: Sequence[str], written: float) -> Report:
    """The whole comparison. Raises ConfigError when no schedule is what `baseline` asks for."""
    numbers = run_numbers(sweep.record)
    schedules = summarise(sweep, numbers)
    chosen = parse_baseline(baseline, schedules)
    comparisons = compare_all(schedules, chosen)
    figures, datasets = charts.build(sweep, schedules)
    return Report(
        sweep=sweep,
        written=written,
        numbers=numbers,
        schedules=schedules,
        baseline=chosen,
        comparisons=comparisons,
        headline=headline(schedules, comparisons),
        cautions=[*cautions(schedules, comparisons), *sweep.cautions],
        settings=facts.describe(sweep),
        figures=figures,
        datasets=datasets,
    )


# --- tables ----------------------------------------------------------------------------------------------


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
    plain: dict[str, Any] = _plain(content)
    return plain


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


# --- files -----------------------------------------------------------------------------------------------


def write(report: Report, folder: Path) -> list[Path]:
    """All files of the report; returns their paths, report.html first."""
    texts = {
        "report.html": render_html(report),
        "report.md": render("report.md.j2", report),
        "report.json": json.dumps(to_json(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        "runs.csv": runs_table(report).write_csv(),
        "schedules.csv": schedules_table(report).write_csv(),
    }
    images = folder / "figures"
    images.mkdir(parents=True, exist_ok=True)
    for stale in set(images.glob("*.png")) - {images / f"{figure.name}.png" for figure in report.figures}:
        stale.unlink()
    for figure in report.figures:
        spec = charts.joined(figure, report.datasets, report.labels)
        (images / f"{figure.name}.png").write_bytes(charts.png(spec))
    for name, content in texts.items():
        write_atomically(folder / name, content)
    return [folder / name for name in texts] + [images / f"{figure.name}.png" for figure in report.figures]


def render_html(report: Report) -> str:
    """The page with everything inside: styles, data and the chart library. It loads nothing."""
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
    n = len(report.labels)
    page = {
        "panels": {panel.name: panel.spec for figure in report.figures for panel in figure.panels},
        "datasets": {name: _encoded(data) for name, data in report.datasets.items()},
        "config": {s: look.config(s, n, font) for s in look.SCHEMES},
        "parameter": panels.HIDDEN,
    }
    data = json.dumps(_plain(page), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return render(
        "report.html.j2",
        report,
        data=data.replace("<", "\\u003c"),  # so that no text can end the script element
        library=_library(),
        colors={scheme: list(enumerate(look.colors(scheme, n))) for scheme in look.SCHEMES},
        dashes=look.dashes(n),
    )


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and the embedder as one script; putting it together takes a second."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=charts.VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def _encoded(data: Dataset) -> dict[str, Any]:
    """Columns of text as a list of the different texts and a number for each row: a tenth of the size."""
    packed: dict[str, Any] = {}
    for column, values in data.items():
        if values and isinstance(values[0], str):
            texts = {text: code for code, text in enumerate(dict.fromkeys(values))}
            packed[column] = {"texts": list(texts), "codes": [texts[value] for value in values]}
        else:
            packed[column] = values
    return packed


def render(template: str, report: Report, **more: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fixed": text.fixed,
        "count": text.count,
        "compact": text.compact,
        "duration": text.duration,
        "estimate": lambda e: text.MISSING if e is None else text.with_interval(e.mean, e.half_width),
        "limits": lambda i: text.MISSING if i is None else text.with_limits(i.mean, i.low, i.high),
        "share": lambda i: text.MISSING if i is None else text.share(i.mean, i.low, i.high),
        "probability": text.probability,
        "difference": _difference,
        "date": facts.date,
        "tied": _tied,
        "sentence_case": lambda words: words[:1].upper() + words[1:],
        "cell": _cell,
    }
    return environment.get_template(template).render(
        report=report, sweep=report.sweep, brief=facts.in_brief(report.sweep), **more
    )


def _cell(value: object) -> str:
    """Text inside a table of Markdown."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")


def _tied(words: str) -> str:
    """No line break inside 1.894 ± 0.021, 18.0 s, 0.047 to 0.151 or (2 seeds)."""
    before = rf"(?<=\d) (?=±|to [{text.MINUS}\d]|(?:s|min|h|d|seeds?)\b)"
    return re.sub(rf"{before}|(?<=±) |(?<=\d to) ", "\N{NO-BREAK SPACE}", words)


def _difference(comparison: Comparison | None) -> str:
    found = comparison.difference if comparison else None
    if found is None or not math.isfinite(found.mean):
        return text.MISSING
    if found.half_width is None:
        return text.signed(found.mean)
    decimals = text.decimals_for(found.half_width)
    return f"{text.signed(found.mean, decimals)} ± {text.fixed(found.half_width, decimals)}"
