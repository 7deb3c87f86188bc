"""Reads a sweep: its points with their state, and the records of all runs as one table.

Nothing is dropped here: a point that was refused, never started, failed or cannot be read stays in the list
with what is known about it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import polars as pl

from analysis.sources import COLUMNS, Log, Source, source
from pipeline.config import Config, ConfigError, nearest
from pipeline.identity import identity_fields
from pipeline.store import Row, RunDirectory, State, Status, home

UNKNOWN = "?"
SEED = "seed"  # runs that differ in this axis alone are the same schedule

RECORD = {"point": pl.Int64, **{column: pl.Float64 for column in COLUMNS}}

# INVALID: the point was refused. MISSING: nothing was started. UNREADABLE: the files are damaged or foreign.
# INTERRUPTED: it says that it is running, but no process holds it.
PointState = State | Literal["INVALID", "MISSING", "UNREADABLE", "INTERRUPTED"]


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
    command: list[str]  # that asked for it last
    url: str | None = None  # of the run in wandb

    @property
    def seed(self) -> str:
        return str(self.config.seed) if self.config else self.axes.get(SEED, UNKNOWN)

    @property
    def setting(self) -> dict[str, str]:
        """The axes that make the schedule: all but the seed and those that the run does not read."""
        return {axis: value for axis, value in self.axes.items() if axis != SEED and self._reads(axis)}

    def _reads(self, axis: str) -> bool:
        """Whether a swept setting can change the run: a constant batch, say, does not read batch.eta."""
        if self.config is None or "." not in axis:
            return True
        group, _, key = axis.partition(".")
        return key.split(".")[0] in identity_fields(self.config).get(group, {})


@dataclass(frozen=True)
class Sweep:
    name: str
    command: list[str]
    created: float | None
    axes: list[str]
    common: dict[str, str]
    runs: list[Run]
    record: pl.DataFrame  # schema RECORD, in the order of training
    source: Source  # of the record
    cautions: list[str]  # what a reader must know of it


def load_sweep(name: str, source_name: str = "record") -> Sweep:
    """The sweep of this name in home(), with the rows of its runs from this source (analysis.sources).

    Raises ConfigError, with the nearest name when there is no such sweep or source.
    """
    origin = source(source_name)
    manifest = _read_manifest(name)
    runs, logs, tables = [], [], []
    command = [str(word) for word in manifest["command"]]
    for number, point in enumerate(_distinct(manifest["points"])):
        run, log = _load_point(number, point, command, origin)
        runs.append(run)
        logs.append(log)
        tables.append(record_table(number, log.rows))
    return Sweep(
        name=str(manifest["name"]),
        command=command,
        created=manifest.get("created"),
        axes=[str(axis) for axis in manifest["axes"]],
        common={str(key): str(value) for key, value in manifest.get("common", {}).items()},
        runs=runs,
        record=pl.concat([pl.DataFrame(schema=RECORD), *tables]),
        source=origin,
        cautions=origin.cautions(logs),
    )


def record_table(point: int, rows: list[Row]) -> pl.DataFrame:
    columns = {column: pl.Series([row.get(column) for row in rows], dtype=pl.Float64) for column in COLUMNS}
    return pl.DataFrame({"point": pl.Series([point] * len(rows), dtype=pl.Int64), **columns})


def _read_manifest(name: str) -> dict[str, Any]:
    folder = home() / "sweeps"
    sweeps = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    if name not in sweeps:
        hint = nearest(name, sweeps)
        raise ConfigError(
            f"{name}: no such sweep in {folder}." + (f" Did you mean {hint}?" if hint else ""),
            f"Sweeps: {', '.join(sweeps) or 'none yet'}",
        )
    path = folder / name / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not a manifest: {error}") from None
    if missing := [key for key in ("name", "command", "axes", "points") if key not in manifest]:
        raise ConfigError(f"{path}: not a manifest: {', '.join(missing)} missing")
    for number, point in enumerate(manifest["points"]):
        if missing := [key for key in ("run", "axes") if key not in point]:
            raise ConfigError(f"{path}: not a manifest: {' and '.join(missing)} missing in point {number}")
    return manifest


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


def _load_point(number: int, point: dict[str, Any], last: list[str], origin: Source) -> tuple[Run, Log]:
    """`last`: the manifest's own command, for points written before each had one."""
    axes = {str(axis): str(value) for axis, value in point["axes"].items()}
    command = [str(word) for word in point.get("command") or last]
    if point["run"] is None:
        return Run(number, None, axes, "INVALID", point.get("problem"), None, None, command), Log()
    directory = RunDirectory(home() / "runs" / point["run"])
    if not directory.config_file.exists():
        return Run(number, directory.id, axes, "MISSING", None, None, None, command), Log()
    config, config_problem = _attempt(directory.config, directory.config_file)
    status, status_problem = _attempt(directory.status, directory.status_file)
    log, log_problem = _attempt(functools.partial(origin.read, directory), directory.path / origin.files)
    unreadable = config_problem or status_problem or log_problem
    if status and status.state == "DONE" and (gap := _gap(log or Log(), status)):
        unreadable = unreadable or f"{origin.files} {gap}, though the run is done"
    state: PointState = "UNREADABLE" if unreadable else status.state if status else "MISSING"
    if state == "RUNNING" and _attempt(directory.is_locked, directory.path)[0] is False:
        state = "INTERRUPTED"  # it died without a word
    problem = unreadable or (status.error if status else None)
    return Run(number, directory.id, axes, state, problem, config, status, command), log or Log()


def _gap(log: Log, status: Status) -> str | None:
    """Why this is not all of a finished run: the loss where it ends would be taken for the final one."""
    if not log.trained:
        return "holds no training step"
    last = log.rows[-1]["step"]
    return f"ends at step {last} of {status.step}" if last < status.step else None


T = TypeVar("T")


def _attempt(read: Callable[[], T], path: Path) -> tuple[T | None, str | None]:
    """What `read` returns, or why the file cannot be read: one damaged run must not hide the others."""
    try:
        return read(), None
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return None, f"{path.name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
