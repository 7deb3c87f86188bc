"""Anybody's runs: a file such as study_file.EXAMPLE says where they are and what they call things.

Rows that have none of the measured metrics are left out. A counter (step, tokens, time, sequences) that was
logged by itself holds for the rows that follow it. Where the step goes back, or another file of the run
begins, the run was resumed: its later rows replace the earlier ones from that step on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from analysis.load import SEED, UNKNOWN, Run, Sweep, record_of
from analysis.records import COLUMNS, ROWS, latest
from analysis.sources import OFFLINE, Origin, damage_notes
from analysis.study_file import DEFAULTS, FIELDS, Study, read_study
from analysis.study_runs import Logged, files_of, from_files, from_server
from analysis.summary import show
from pipeline.config import ConfigError, did_you_mean
from pipeline.store import home

COUNTERS = (
    *("step", "tokens", "time", "sequences", "epochs"),
    *("gradient_evaluations", "loss_evaluations"),
)
MEASURED = tuple(column for column in COLUMNS if column not in COUNTERS)
_PART = {"part": pl.Int32, **ROWS}

_OWN = ("_step", "_runtime", "_timestamp")  # of every row


def load_study(path: Path) -> Sweep:
    """The runs that this file names, as a sweep. Raises ConfigError with what is wrong in it."""
    study = read_study(path)
    if (home() / "sweeps" / study.name / "manifest.json").exists():
        raise ConfigError(
            f"{path}: name: {study.name}: a sweep of this home has that name, and reports/{study.name} its "
            f"report. Choose another"
        )
    if study.source == OFFLINE:
        paths = files_of(study, path)
        found, lost = from_files(paths, {*study.metrics.values(), *_OWN})
        place = ", ".join(study.files)
    else:
        found, lost = from_server(study), []
        place = study.source
    if not found:
        passing = " that passes the filters" if study.filters else ""
        raise ConfigError(f"{path}: {place}: no run is there{passing}", *lost)
    _check_keys(path, study, found)
    chosen = [run for run in found if _passes(run, study.filters)]
    chosen.sort(key=lambda run: (run.started, run.id))
    if not chosen:
        raise ConfigError(
            f"{path}: filters: none of {len(found)} runs passes {_text(study.filters)}",
            *(f"There are: {key}: {_counted(_values(run, key) for run in found)}" for key in study.filters),
        )
    known = set().union(*(run.metrics for run in chosen))
    if not known >= set(study.metrics.values()):
        if study.source == OFFLINE:  # all names, which takes longer
            known = set().union(*(run.metrics for run in from_files(paths, None)[0]))
        _refuse_metrics(path, study, known)
    tables = {number: _rows(run, study.metrics) for number, run in enumerate(chosen)}
    runs = [_run(number, run, study, tables[number]) for number, run in enumerate(chosen)]
    _refuse_unlike(path, chosen, runs)
    return Sweep(
        name=study.name,
        command=["python", "-m", "analysis", str(path)],
        created=None,
        axes=[*study.axes, SEED],
        common={},
        runs=runs,
        record=record_of(tables),
        source=Origin(study.source, place),
        cautions=[*damage_notes("Files that tell no run", lost), *_cautions(study, chosen)],
    )


def _check_keys(path: Path, study: Study, runs: Sequence[Logged]) -> None:
    known = list(dict.fromkeys(key for run in runs for key in run.config))
    unknown = [key for key in study.keys if key not in known]
    if unknown:
        differing = [key for key in known if len({str(run.config.get(key)) for run in runs}) > 1]
        what, keys = ("Keys that differ", differing) if differing else ("Keys", known)
        raise ConfigError(
            *(f"{path}: {key}: no run has this config key.{did_you_mean(key, known)}" for key in unknown),
            f"{what}: {_some(keys)}",
        )


def _refuse_metrics(path: Path, study: Study, known: set[str]) -> None:
    names = sorted(name for name in known if name not in _OWN)
    raise ConfigError(
        *(
            f"{path}: metrics: {column}: no run has the metric {metric}.{did_you_mean(metric, names)}"
            for column, metric in study.metrics.items()
            if metric not in known
        ),
        f"There are: {_some(names)}",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return (", ".join(names[:40]) or "none") + more


def _values(run: Logged, key: str) -> list[Any]:
    value = run.fields[key] if key in FIELDS else run.config.get(key)
    return value if isinstance(value, list) else [value]


def _passes(run: Logged, filters: Mapping[str, Any]) -> bool:
    for key, wanted in filters.items():
        told = str if key in FIELDS else _told  # an id such as 1e5 is no number
        any_of = {told(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
        if not any_of & {told(value) for value in _values(run, key)}:
            return False
    return True


def _told(value: object) -> str:
    """The same for 16, 16.0 and 1.6e1, which YAML takes for text."""
    try:
        return str(float(str(value)))
    except ValueError:
        return str(value)


def _counted(values: Iterator[list[Any]]) -> str:
    counts = Counter(str(value) for each in values for value in each)
    return ", ".join(f"{value} ({n})" for value, n in counts.most_common(10)) or "none"


def _text(filters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in filters.items())


# --- their rows ------------------------------------------------------------------------------------------


def _rows(run: Logged, metrics: Mapping[str, str]) -> pl.DataFrame:
    parts = []
    for number, part in enumerate(run.parts):
        have = {column: metric for column, metric in metrics.items() if metric in part.columns}
        absent = pl.lit(None, pl.Float64)
        columns = {column: pl.col(have[column]) if column in have else absent for column in COLUMNS}
        named = part.select(part=pl.lit(number), **columns) if len(part) else pl.DataFrame(schema=_PART)
        parts.append(named.with_columns(pl.col(COUNTERS).forward_fill()))
    rows = pl.concat(parts)
    measured = pl.any_horizontal(pl.col(column).is_not_null() for column in MEASURED)
    rows = rows.filter(measured & pl.col("step").is_not_null())
    again = (pl.col("step") < pl.col("step").shift()) | (pl.col("part") != pl.col("part").shift())
    rows = latest(rows.with_columns(attempt=again.fill_null(False).cum_sum().cast(pl.Float64)))
    # A resumed run's clock begins anew: what the attempts before it took is added.
    back = -pl.col("time").diff().clip(upper_bound=0)
    return rows.with_columns(time=pl.col("time") + back.fill_null(0.0).cum_sum()).select(COLUMNS)


def _run(number: int, run: Logged, study: Study, rows: pl.DataFrame) -> Run:
    state, problem = run.state, run.problem
    if state == "DONE" and (problem or rows.is_empty()):
        lacking = ", ".join(metric for metric in study.metrics.values() if metric not in run.metrics)
        state, problem = "UNREADABLE", problem or f"has no row with {lacking or 'what is asked for'}"
    value = run.config.get(study.seed) if study.seed else None
    seed = run.id if value is None else _as_text(value)  # runs of unknown seeds share none
    axes = {name: _as_text(run.config.get(key)) for name, key in study.axes.items()}
    task = {key: _as_text(run.config.get(key)) for key in study.task}
    return Run(number, run.id, {**axes, SEED: seed}, state, problem, None, None, [], run.url, task)


def _refuse_unlike(path: Path, logged: Sequence[Logged], runs: Sequence[Run]) -> None:
    """Of finished runs with the same axes, seed and task only the newest counts: the others must be that run
    once more, with the same config."""
    alike: dict[tuple[str, ...], list[Logged]] = {}
    for one, run in zip(logged, runs, strict=True):
        if run.state == "DONE":
            alike.setdefault((*run.axes.values(), *run.task.values()), []).append(one)
    differing = dict.fromkeys(key for group in alike.values() for key in _differing(group))
    if differing:
        group = next(group for group in alike.values() if _differing(group))
        axes = next(run.axes for run in runs if run.id == group[0].id)
        raise ConfigError(
            f"{path}: axes: {len(group)} finished runs have {_text(axes)}, of which only the newest would "
            f"count, but their configs differ: {_few([run.id for run in group])}",
            *(f"{key}: {_counted(_values(run, key) for run in logged)}" for key in [*differing][:40]),
            "Name the key that makes another schedule under axes:, or leave the other runs out with filters:",
        )


def _differing(runs: Sequence[Logged]) -> list[str]:
    """The config keys in which these runs differ, but for those that hold each run's own id or name."""
    first = runs[0]
    return [
        key
        for key in dict.fromkeys(key for run in runs for key in run.config)
        if any(run.config.get(key) != first.config.get(key) for run in runs)
        and not all(run.config.get(key) in (run.id, run.fields["name"]) for run in runs)
    ]


def _as_text(value: object) -> str:
    return UNKNOWN if value is None else show(value)


def _cautions(study: Study, runs: Sequence[Logged]) -> list[str]:
    notes = damage_notes("Logs that did not come whole", [line for run in runs for line in run.warnings])
    for column, metric in study.metrics.items():
        if without := [run.id for run in runs if metric not in run.metrics]:
            many = f"{len(without)} of {len(runs)} runs"
            notes.append(f"{many} never logged {metric} ({column}): {_few(without)}.")
    for key in dict.fromkeys(study.keys):
        if without := [run.id for run in runs if run.config.get(key) is None]:
            notes.append(f"{len(without)} of {len(runs)} runs have no config key {key}: {_few(without)}.")
    if "tokens" not in study.metrics:
        notes.append("No metric counts tokens: losses are compared where the runs ended, however far.")
    if study.metrics["step"] == DEFAULTS["step"]:
        notes.append(
            "Steps are wandb's own, _step: the calls that logged something, unless the training numbered "
            "them. metrics: step names the counter of optimizer steps."
        )
    if study.seed is None:
        notes.append("No config key tells seeds apart: runs cannot be paired, so no difference is given.")
    several = [run.id for run in runs if len(run.parts) > 1]
    if several and study.metrics["step"] == DEFAULTS["step"]:
        notes.append(
            f"Of runs in several files the last file counts, since wandb's own steps begin anew in each; a "
            f"counter that the training logged, as metrics: step, would join them: {_few(several)}."
        )
    return notes


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (" …" if len(ids) > 5 else "")
