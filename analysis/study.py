"""Anybody's runs: a file such as EXAMPLE says where they are and what their keys and metrics are called.

Rows that have none of the measured metrics are left out. A counter (step, tokens, time, sequences) that was
logged by itself holds for the rows that follow it. Where the step goes back, or another file of the run
begins, the run was resumed: its later rows replace the earlier ones from that step on.
"""

from __future__ import annotations

import functools
import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml  # type: ignore[import-untyped]

from analysis import online
from analysis.load import SEED, UNKNOWN, PointState, Run, Sweep, record_of
from analysis.records import COLUMNS, ROWS, latest, numbers
from analysis.sources import OFFLINE, ONLINE, STATES, Origin, attempt, damage_notes
from analysis.summary import RunNumbers, show
from analysis.wandb_files import WandbRun, read_run
from pipeline.config import ConfigError, did_you_mean
from pipeline.store import home

EXAMPLE = """\
  name: study                                   # of the report
  source: wandb-offline                         # or wandb:ENTITY/PROJECT
  files: [wandb, "../else/*/wandb"]             # folders or files, from this file's folder; offline alone
  filters: {group: ablation, optim.lr: 0.001}   # wandb's fields or config keys; a list: any of it
  axes: {batch: train.batch_size, lr: optim.lr} # name in the report: config key
  seed: seed                                    # config key; without it every run is a seed of its own
  task: [data.name]                             # config keys; runs that differ there are never compared
  metrics:                                      # name in the record: metric
    train/loss: loss
    val/loss: eval/loss
    tokens: consumed_tokens
    step: _step                                 # without it: wandb's count of log calls
    time: _runtime                              # without it: wandb's clock, in seconds
"""

COUNTERS = (
    *("step", "tokens", "time", "sequences", "epochs"),
    *("gradient_evaluations", "loss_evaluations"),
)
MEASURED = tuple(column for column in COLUMNS if column not in COUNTERS)
_PART = {"part": pl.Int32, **ROWS}
LOSSES = ("train/loss", "val/loss")
# Columns of the table of runs (analysis.tables) beside the axes.
TAKEN = {
    *("run", "schedule", "state", "attempt", "budget_tokens", "host", "started", "updated", "problem"),
    *RunNumbers.__dataclass_fields__,
}
_DEFAULTS = {"step": "_step", "time": "_runtime"}
_OWN = ("_step", "_runtime", "_timestamp")  # of every row

# Names in the file -> how wandb's server calls them.
_FIELDS = {
    "group": "group",
    "state": "state",
    "tags": "tags",
    "job_type": "jobType",
    "name": "displayName",
    "id": "name",
}


@dataclass(frozen=True)
class Study:
    """The file, checked."""

    name: str
    source: str
    files: list[str] = field(default_factory=list)
    filters: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    seed: str | None = None
    task: list[str] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Of the config, that must be known."""
        own = [key for key in self.filters if key not in _FIELDS]
        return [*self.axes.values(), *([self.seed] if self.seed else []), *self.task, *own]


@dataclass(frozen=True)
class Logged:
    """One run of wandb's, wherever it was read. `parts`: its rows, one table for each file."""

    id: str
    fields: dict[str, Any]  # by the names of _FIELDS
    started: str
    state: PointState
    config: dict[str, Any]
    parts: list[pl.DataFrame]
    url: str | None = None
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def metrics(self) -> set[str]:
        return {name for part in self.parts for name in part.columns}


def load_study(path: Path) -> Sweep:
    """The runs that this file names, as a sweep. Raises ConfigError with what is wrong in it."""
    study = read_study(path)
    if (home() / "sweeps" / study.name / "manifest.json").exists():
        raise ConfigError(
            f"{path}: name: {study.name}: a sweep of this home has that name, and reports/{study.name} its "
            f"report. Choose another"
        )
    if study.source == OFFLINE:
        paths = _paths(study, path)
        found, lost = _read(paths, {*study.metrics.values(), *_OWN})
        place = ", ".join(study.files)
    else:
        found, lost = _online(study), []
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
            known = set().union(*(run.metrics for run in _read(paths, None)[0]))
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


# --- the file --------------------------------------------------------------------------------------------


def read_study(path: Path) -> Study:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no settings; python -m analysis --help shows what belongs there")
    options = list(Study.__dataclass_fields__)
    problems = [
        f"{path}: {key}: no such setting.{did_you_mean(str(key), options)}"
        for key in tree
        if key not in options
    ]
    if problems:
        raise ConfigError(*problems, f"Settings: {', '.join(options)}")
    problems = [f"{path}: {key}: missing" for key in ("name", "source", "metrics") if not tree.get(key)]
    if problems:
        raise ConfigError(*problems)
    kinds = {"files": list, "filters": dict, "axes": dict, "task": list, "metrics": dict}
    for key in ("files", "task", "axes"):  # one thing may stand for a list of one
        if isinstance(tree.get(key), str):
            tree[key] = [tree[key]]
    if isinstance(tree.get("axes"), list):
        tree["axes"] = {str(key): key for key in tree["axes"]}
    for key, kind in kinds.items():
        if not isinstance(tree.get(key) or kind(), kind):
            what = "a list" if kind is list else "a mapping"
            raise ConfigError(f"{path}: {key}: is {what}, not {tree[key]!r}")
    study = Study(
        name=str(tree["name"]),
        source=str(tree["source"]),
        files=[str(each) for each in tree.get("files") or []],
        filters={str(key): value for key, value in (tree.get("filters") or {}).items()},
        axes={str(name): str(key) for name, key in (tree.get("axes") or {}).items()},
        seed=str(tree["seed"]) if tree.get("seed") else None,
        task=[str(key) for key in tree.get("task") or []],
        metrics=_DEFAULTS | {str(name): str(metric) for name, metric in tree["metrics"].items()},
    )
    _check(path, study)
    return study


def _check(path: Path, study: Study) -> None:
    plain = study.name.isprintable() and study.name == study.name.strip() and study.name not in (".", "..")
    if not plain or "/" in study.name:
        raise ConfigError(
            f"{path}: name: {study.name!r}: is a folder of reports/, so one plain name, without a slash"
        )
    if study.source != OFFLINE and not study.source.startswith(ONLINE):
        raise ConfigError(f"{path}: source: {study.source}: either {OFFLINE} or {ONLINE}ENTITY/PROJECT")
    if study.source == OFFLINE and not study.files:
        raise ConfigError(f"{path}: files: missing; the wandb folders to read, such as files: [wandb]")
    if SEED in study.axes:
        raise ConfigError(f"{path}: axes: {SEED}: is no axis, but the setting {SEED}: {study.axes[SEED]}")
    for name, key in study.axes.items():
        if name in TAKEN:
            free = f"config.{name}"
            raise ConfigError(
                f"{path}: axes: {name}: the table of runs has a column of that name. Call it {free}: {key}"
            )
    for name in study.metrics:
        if name not in COLUMNS:
            raise ConfigError(
                f"{path}: metrics: {name}: the report knows no such metric.{did_you_mean(name, COLUMNS)}",
                f"It knows: {', '.join(COLUMNS)}",
            )
    if not any(name in study.metrics for name in LOSSES):
        raise ConfigError(f"{path}: metrics: names no loss, neither {' nor '.join(LOSSES)}")


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


# --- the runs --------------------------------------------------------------------------------------------


def _online(study: Study) -> list[Logged]:
    wanted = {
        _FIELDS[key]: {"$in": value} if isinstance(value, list) else value
        for key, value in study.filters.items()
        if key in _FIELDS
    }
    return [
        Logged(
            run.id,
            {name: getattr(run, name) for name in _FIELDS},
            run.created,
            STATES.get(run.state, "LOST"),
            run.config,
            [run.rows],
            run.url,
            [run.warning] if run.warning else [],
            run.problem or (None if run.state in ("finished", "running") else f"{run.state}, says wandb"),
        )
        for run in online.fetch(study.source.removeprefix(ONLINE), [wanted])
    ]


def _paths(study: Study, path: Path) -> list[Path]:
    found: list[Path] = []
    for pattern in study.files:
        places = glob.glob(str(path.parent / os.path.expanduser(pattern)), recursive=True)
        files = [
            file
            for place in map(Path, sorted(places))
            for file in (sorted(place.rglob("run-*.wandb")) if place.is_dir() else [place])
            if file.is_file()
        ]
        if not files:
            raise ConfigError(f"{path}: files: {pattern}: holds no run-*.wandb")
        found += files
    return list({file.resolve(): file for file in found}.values())  # once, though two patterns name it


def _read(paths: Sequence[Path], metrics: set[str] | None) -> tuple[list[Logged], list[str]]:
    """The runs in these files, and a line for each file that tells none: damaged, foreign, or only begun."""
    whole: list[tuple[Path, WandbRun]] = []
    lost = []
    for path in paths:
        run, problem = attempt(functools.partial(read_run, path, metrics), path)
        if run and run.id:
            whole.append((path, run))
        elif line := problem or (run and run.warning):
            lost.append(line)
    return _merged(whole), lost


def _merged(whole: list[tuple[Path, WandbRun]]) -> list[Logged]:
    """The files of each id as one run, as they began one after the other."""
    whole.sort(key=lambda item: (item[1].started or 0.0, str(item[0])))
    by_id: dict[str, list[WandbRun]] = {}
    for _, run in whole:
        by_id.setdefault(str(run.id), []).append(run)
    return [_offline(id_, parts) for id_, parts in by_id.items()]


def _offline(id_: str, parts: Sequence[WandbRun]) -> Logged:
    last = parts[-1]
    state: PointState = "LOST" if last.exit_code is None else "FAILED" if last.exit_code else "DONE"
    problems: dict[PointState, str] = {
        "LOST": "its file has no end: it was killed, or goes on",
        "FAILED": f"exit code {last.exit_code}",
    }
    return Logged(
        id_,
        dict(
            group=last.group,
            state=_WORDS[state],
            tags=last.tags,
            job_type=last.job_type,
            name=last.name,
            id=id_,
        ),
        f"{parts[0].started or 0:020.6f}",
        state,
        last.config,
        [numbers(part.rows) for part in parts],
        warnings=[part.warning for part in parts if part.warning],
        problem=problems.get(state),
    )


_WORDS: dict[PointState, str] = {"DONE": "finished", "FAILED": "failed", "LOST": "running"}


def _values(run: Logged, key: str) -> list[Any]:
    value = run.fields[key] if key in _FIELDS else run.config.get(key)
    return value if isinstance(value, list) else [value]


def _passes(run: Logged, filters: Mapping[str, Any]) -> bool:
    for key, wanted in filters.items():
        told = str if key in _FIELDS else _told  # an id such as 1e5 is no number
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
    if study.metrics["step"] == _DEFAULTS["step"]:
        notes.append(
            "Steps are wandb's own, _step: the calls that logged something, unless the training numbered "
            "them. metrics: step names the counter of optimizer steps."
        )
    if study.seed is None:
        notes.append("No config key tells seeds apart: runs cannot be paired, so no difference is given.")
    several = [run.id for run in runs if len(run.parts) > 1]
    if several and study.metrics["step"] == _DEFAULTS["step"]:
        notes.append(
            f"Of runs in several files the last file counts, since wandb's own steps begin anew in each; a "
            f"counter that the training logged, as metrics: step, would join them: {_few(several)}."
        )
    return notes


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (" …" if len(ids) > 5 else "")
