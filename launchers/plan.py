"""A sweep before it runs: its points, their ids, what varies between them and how far each has come."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from omegaconf import DictConfig

from pipeline.config import Config, ConfigError, typed
from pipeline.identity import complete, run_id
from pipeline.store import RunDirectory, home, python

Compose = Callable[[Sequence[str]], DictConfig]
PointState = Literal["new", "running", "done", "failed", "cancelled", "preempted", "interrupted", "invalid"]

_NOT_AN_AXIS = ("launch", "track", "sweep", "hydra")  # settings that change no result


@dataclass(frozen=True)
class Point:
    """One point of a sweep. Either `run` and `config`, or the `problem` that makes it invalid."""

    axes: dict[str, str]  # the values of what varies in this sweep, as given on the command line
    overrides: list[str]
    run: str | None
    config: Config | None
    problem: str | None  # every reason, one a line

    @property
    def directory(self) -> RunDirectory:
        assert self.run
        return RunDirectory(home() / "runs" / self.run)


@dataclass(frozen=True)
class Plan:
    name: str
    points: list[Point]
    axes: list[str]  # in the order of the command line
    common: dict[str, str]  # what was given for all points alike
    duplicates: int  # points that are the same run as an earlier one

    @property
    def valid(self) -> list[Point]:
        return [point for point in self.points if point.run]

    @property
    def invalid(self) -> list[Point]:
        return [point for point in self.points if not point.run]


def make_plan(jobs: Iterable[Sequence[str]], compose: Compose) -> Plan:
    """Composes every job. One whose values cannot work together becomes an invalid point; a misspelt key or
    option or a wrong type raises, because it is a mistake whatever the other values are."""
    points = [_point(list(overrides), compose(overrides)) for overrides in jobs]
    _refuse_several_names(points)
    axes, common = varying([point.overrides for point in points])
    for point in points:
        point.axes.update((key, value) for key, value in _values(point.overrides).items() if key in axes)
    merged = _merge_duplicates(points)
    name = _sweep_name([point for point in merged if point.config], common)
    return Plan(name, [_name(point, name) for point in merged], axes, common, len(points) - len(merged))


def varying(overrides: Sequence[Sequence[str]]) -> tuple[list[str], dict[str, str]]:
    """The keys with several values, and the values of the others."""
    values = [_values(each) for each in overrides]
    keys = list(dict.fromkeys(key for each in values for key in each))
    axes = [key for key in keys if len({each.get(key) for each in values}) > 1]
    return axes, {key: values[0][key] for key in keys if key not in axes}


def state(point: Point) -> PointState:
    """Where the point's run stands, by its files and its lock."""
    if not point.run:
        return "invalid"
    status = point.directory.status()
    if status is None:
        return "new"
    if status.state == "DONE":
        return "done"
    if point.directory.is_locked():
        return "running"
    states: dict[str, PointState] = {
        "PENDING": "new",
        "RUNNING": "interrupted",  # nobody holds the lock: it died without a word
        "FAILED": "failed",
        "PREEMPTED": "preempted",
        "CANCELLED": "cancelled",
    }
    return states[status.state]


def freeze(plan: Plan) -> None:
    """Writes the run directory of every valid point that has none."""
    for point in plan.valid:
        assert point.config
        point.directory.freeze(point.config)


def command_line() -> list[str]:
    """The command that asked for this sweep."""
    return [python(), "-m", "pipeline", *sys.argv[1:]]


def again(launcher: str | None = None) -> str:
    """The command to type for the same sweep, with another launcher if one is named."""
    words = command_line()
    if launcher:
        words = [*(w for w in words if not w.startswith("hydra/launcher=")), f"hydra/launcher={launcher}"]
    return shlex.join(words)


def compare(plan: Plan) -> str:
    """The command to type for the report on the sweep."""
    return shlex.join([python(), "-m", "analysis", plan.name])


def _point(overrides: list[str], tree: DictConfig) -> Point:
    config = typed(tree)
    try:
        config = complete(config)
        return Point({}, overrides, run_id(config), config, None)
    except ConfigError as error:
        return Point({}, overrides, None, None, str(error))


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """{setting: text} of those overrides that can tell one result from another."""
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs if re.split("[./]", key)[0] not in _NOT_AN_AXIS}


def _merge_duplicates(points: list[Point]) -> list[Point]:
    """One point for each run. Of several, only the values they agree on are kept: the others have no part
    in the result, as batch.eta in `batch=constant,norm_test batch.eta=0.2,0.3` for the constant batch."""
    merged: dict[str, Point] = {}
    for number, point in enumerate(points):
        key = point.run or f"invalid {number}"
        if (first := merged.get(key)) is None:
            merged[key] = point
            continue
        agreed = {axis: value for axis, value in first.axes.items() if point.axes.get(axis) == value}
        merged[key] = dataclasses.replace(first, axes=agreed)
    return list(merged.values())


def _refuse_several_names(points: Sequence[Point]) -> None:
    """A name is no part of a run's result, so points that differ in it alone would silently become one."""
    pairs = (override.lstrip("+").partition("=") for point in points for override in point.overrides)
    names = list(dict.fromkeys(value for key, _, value in pairs if key == "sweep.name"))
    if len(names) > 1:
        raise ConfigError(
            f"sweep.name={','.join(names)}: a sweep has one name, such as sweep.name={names[0]}; "
            f"for several sweeps give the command once for each"
        )


def _sweep_name(points: list[Point], common: dict[str, str]) -> str:
    given = {point.config.sweep.name for point in points if point.config}
    name = given.pop() if len(given) == 1 else None
    if name is None:
        digest = hashlib.sha256("\n".join(sorted(point.run or "" for point in points)).encode())
        name = f"{common.get('experiment', 'sweep')}-{digest.hexdigest()[:4]}"
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ConfigError(
            f"sweep.name={name}: names a directory, so letters, digits, '-', '_' and '.' only. "
            f"Nearest: {re.sub(r'[^0-9A-Za-z_.-]+', '-', name).strip('-.') or 'sweep'}"
        )
    return name


def _name(point: Point, sweep: str) -> Point:
    """The point with the sweep's name in its config: wandb groups the runs of a sweep by it."""
    if point.config is None:
        return point
    config = dataclasses.replace(
        point.config,
        sweep=dataclasses.replace(point.config.sweep, name=sweep),
        track=dataclasses.replace(point.config.track, group=point.config.track.group or sweep),
    )
    return dataclasses.replace(point, config=config)
