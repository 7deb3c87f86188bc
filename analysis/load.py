"""Reads a sweep: its points with their state, and the records of all runs as one table.

Nothing is dropped here: a point that was refused, never started, failed or cannot be read stays in the list
with what is known about it.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from analysis.draft import draft
from analysis.records import ROWS
from analysis.sources import ONLINE, Log, Logs, Origin, attempt, source
from pipeline.config import ClassifierConfig, Config, ConfigError, LlamaConfig, did_you_mean
from pipeline.identity import identity_fields
from pipeline.store import RunDirectory, State, Status, home

UNKNOWN = "?"
SEED = "seed"  # runs that differ in this axis alone are the same schedule

# Of the data group: who reads which part in what order; the held-out sequences are the same.
_NO_TASK = ("seed", "micro_batch", "distribution")

RECORD = {"point": pl.Int64, **ROWS}

# INVALID: the point was refused. MISSING: nothing was started. UNREADABLE: the files are damaged or foreign.
# LOST: it says that it is running, but no process holds it.
PointState = State | Literal["INVALID", "MISSING", "UNREADABLE", "LOST"]


@dataclass(frozen=True)
class Run:
    """One point of the sweep. `point` is its number in the record table; `id` is None when it was refused."""

    point: int
    id: str | None
    axes: dict[str, str]
    state: PointState
    problem: str | None
    config: Config | None
    status: Status | None
    command: list[str]  # that asked for it last; [] when nothing here did
    url: str | None = None  # of its page at wandb
    task: dict[str, str] = field(default_factory=dict)  # what a loss is a loss of: others are no comparison

    @property
    def seed(self) -> str:
        return str(self.config.seed) if self.config else self.axes.get(SEED, UNKNOWN)

    @property
    def setting(self) -> dict[str, str]:
        """The axes that make the schedule: all but the seed and those that the run does not read."""
        return {axis: value for axis, value in self.axes.items() if axis != SEED and self._reads(axis)}

    @property
    def labelled(self) -> bool:
        """Whether what its counters call a token is a labelled sample."""
        return self.config is not None and isinstance(self.config.model, ClassifierConfig)

    @property
    def flops_per_token(self) -> float | None:
        """Of a token that is counted; under gradient coding each is computed several times. Of a labelled
        sample it is not known, since its shape is that of the data."""
        if self.config is None or not isinstance(self.config.model, LlamaConfig):
            return None
        times = self.config.sync.redundancy if self.config.sync.method == "gradient_coding" else 1
        return times * self.config.model.flops_per_token(self.config.data.sequence_length)

    def _reads(self, axis: str) -> bool:
        """Whether a swept setting can change the run: a constant batch, say, does not read batch.eta."""
        if self.config is None or "." not in axis:
            return True
        group, _, key = axis.partition(".")
        return key.split(".")[0] in identity_fields(self.config).get(group, {})


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was found. Its points are in `runs`, their logged rows in `record`."""

    name: str
    command: list[str]
    created: float | None
    axes: list[str]
    common: dict[str, str]
    runs: list[Run]
    record: pl.DataFrame  # schema RECORD, in the order of training
    source: Origin  # of the record
    cautions: list[str]  # what a reader must know of it

    @functools.cached_property
    def rows(self) -> dict[int, pl.DataFrame]:
        """The record by point. Cut at once: what a filter finds for one run keeps memory for all of them."""
        return {int(key[0]): rows for key, rows in self.record.partition_by("point", as_dict=True).items()}


def load_sweep(name: str, source_name: str = "record") -> Sweep:
    """The sweep of this name in home(), with the rows of its runs from this source (analysis.sources).

    Raises ConfigError, with the nearest name when there is no such sweep or source.
    """
    found = source(source_name)
    manifest = _read_manifest(name, source_name)
    command = [str(word) for word in manifest["command"]]
    points = _distinct(manifest["points"])
    if not points:
        raise ConfigError(
            f"{name}: a sweep without points, of which nothing can be told: {shlex.join(command)}"
        )
    directories = [RunDirectory(home() / "runs" / point["run"]) for point in points if point["run"]]
    # A server may know runs whose directories are on another machine.
    asked = [run for run in directories if source_name.startswith(ONLINE) or run.config_file.exists()]
    logs = found.read(asked)
    runs = [_load_point(number, point, command, found.origin, logs) for number, point in enumerate(points)]
    return Sweep(
        name=str(manifest["name"]),
        command=command,
        created=manifest.get("created"),
        axes=[str(axis) for axis in manifest["axes"]],
        common={str(key): str(value) for key, value in manifest.get("common", {}).items()},
        runs=runs,
        record=record_of({run.point: logs[run.id].rows for run in runs if run.id and run.id in logs}),
        source=found.origin,
        cautions=found.cautions(list(logs.values())),
    )


def record_of(tables: Mapping[int, pl.DataFrame]) -> pl.DataFrame:
    """The record table of the rows of points."""
    numbered = [rows.select(pl.lit(point, pl.Int64).alias("point"), *ROWS) for point, rows in tables.items()]
    return pl.concat([pl.DataFrame(schema=RECORD), *numbered])


def _read_manifest(name: str, source_name: str) -> dict[str, Any]:
    folder = home() / "sweeps"
    sweeps = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    if name not in sweeps:
        problems = [
            f"{name}: no such sweep in {folder}." + did_you_mean(name, sweeps),
            f"Sweeps: {', '.join(sweeps) or 'none yet'}",
        ]
        if source_name.startswith(ONLINE):
            problems += [
                f"Its manifest, sweeps/{name}/manifest.json, says which runs are its points. Without it, "
                f"save what follows as {name}.yaml, correct it, and give {name}.yaml instead of {name}:",
                "",
                draft(source_name.removeprefix(ONLINE), name),
            ]
        raise ConfigError(*problems)
    path = folder / name / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not a manifest: {error}") from None
    _check(path, "", {"common": {}, **manifest} if isinstance(manifest, dict) else manifest, _MANIFEST)
    for number, point in enumerate(manifest["points"]):
        _check(path, f" in point {number}", point, _POINT)
    return manifest


_MANIFEST = {"name": str, "command": list, "axes": list, "points": list, "common": dict}
_POINT = {"run": str | None, "axes": dict}


def _check(path: Path, where: str, tree: object, kinds: Mapping[str, Any]) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a manifest: {tree!r}{where} is no mapping")
    if missing := [key for key in kinds if key not in tree]:
        raise ConfigError(f"{path}: not a manifest: {' and '.join(missing)} missing{where}")
    for key, kind in kinds.items():
        if not isinstance(tree[key], kind):
            raise ConfigError(f"{path}: not a manifest: {key}: {tree[key]!r}{where}")


def _distinct(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that are the same run become one point with the axes they agree on.

    `batch=constant,norm_test batch.eta=0.2,0.3` names the constant run twice, since it does not read eta.
    """
    kept: list[dict[str, Any]] = []
    by_run: dict[str, dict[str, Any]] = {}
    for point in points:
        earlier = by_run.get(point["run"]) if point["run"] else None
        if earlier is not None:
            axes = earlier["axes"].items()
            earlier["axes"] = {axis: value for axis, value in axes if point["axes"].get(axis) == value}
            continue
        kept.append(dict(point))
        if point["run"]:
            by_run[point["run"]] = kept[-1]
    return kept


def _load_point(number: int, point: dict[str, Any], last: list[str], origin: Origin, logs: Logs) -> Run:
    """`last`: the manifest's own command, for points written before each had one."""
    axes = {str(axis): str(value) for axis, value in point["axes"].items()}
    command = [str(word) for word in point.get("command") or last]
    if point["run"] is None:
        return Run(number, None, axes, "INVALID", point.get("problem"), None, None, command)
    directory = RunDirectory(home() / "runs" / point["run"])
    log = logs.get(directory.id, Log())
    if log.url and log.problem:  # what is missing is not the run: no command makes it
        command = []
    if not directory.config_file.exists():
        return _load_remote(number, directory.id, axes, log, command, origin)
    config, config_problem = attempt(directory.config, directory.config_file)
    status, status_problem = attempt(lambda: _status_in(directory), directory.status_file)
    unreadable = config_problem or status_problem or log.problem or _gap(log, status, origin)
    state: PointState = "UNREADABLE" if unreadable else status.state if status else "MISSING"
    if state == "RUNNING" and attempt(directory.is_locked, directory.path)[0] is False:
        state = "LOST"  # it died without a word
    problem = unreadable or (status.error if status else None)
    return Run(number, directory.id, axes, state, problem, config, status, command, log.url, _task(config))


def _status_in(directory: RunDirectory) -> Status | None:
    """Raises ValueError for a damaged one, which is not to pass for that of a failed run."""
    try:
        return directory.read_status()
    except FileNotFoundError:
        return None


def _load_remote(
    number: int, id_: str, axes: dict[str, str], log: Log, command: list[str], origin: Origin
) -> Run:
    """A run that has no directory here, as far as its log tells what it was."""
    unreadable = log.problem or _gap(log, log.status, origin)
    state: PointState = "MISSING"
    if log.status:
        state = "UNREADABLE" if unreadable else log.status.state
    problem = unreadable or (log.status.error if log.status else None)
    return Run(number, id_, axes, state, problem, log.config, log.status, command, log.url, _task(log.config))


def _task(config: Config | None) -> dict[str, str]:
    """The data that are read and that losses are measured on."""
    if config is None:
        return {}
    fields = identity_fields(config)
    data = {f"data.{key}": value for key, value in fields["data"].items() if key not in _NO_TASK}
    return {key: str(value) for key, value in {**data, "eval.sequences": fields["eval"]["sequences"]}.items()}


def _gap(log: Log, status: Status | None, origin: Origin) -> str | None:
    """Why this is not all of a finished run: the loss where it ends would be taken for the final one."""
    if status is None or status.state != "DONE":
        return None
    if not log.trained:
        gap = "holds no training step"
    elif (last := int(log.rows["step"][-1])) < status.step:
        gap = f"ends at step {last} of {status.step}"
    else:
        return None
    return f"{origin.place.removeprefix('runs/*/')} {gap}, though the run is done"
