"""A sweep before it runs: its points, their ids, what varies between them and how far each has come."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launchers.exclude import Exclusions, summary
from launchers.state import Queue, RunState, run_state
from pipeline.config import Config, ConfigError, typed
from pipeline.identity import complete, run_id
from pipeline.store import RunDirectory, home, python

if TYPE_CHECKING:
    from launchers.compose import Compose  # imports Hydra, which `python -m launchers` has no use for

PointState = RunState | Literal["invalid"]

_WRITERS = 16
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
    """What a command line asks for."""

    name: str
    points: list[Point]
    axes: list[str]  # in the order of the command line
    common: dict[str, str]  # what was given for all points alike
    zips: list[list[str]]  # axes that are walked together
    duplicates: int  # points that are the same run as an earlier one
    excluded: list[Point]  # left out by sweep.exclude: neither run nor invalid
    unmet: list[str]  # the conditions of sweep.exclude that no point meets

    @property
    def valid(self) -> list[Point]:
        return [point for point in self.points if point.run]

    @property
    def invalid(self) -> list[Point]:
        return [point for point in self.points if not point.run]


def make_plan(jobs: Iterable[Sequence[str]], compose: Compose) -> Plan:
    """Composes every job. One whose values cannot work together becomes an invalid point; a misspelt key or
    option or a wrong type raises, because it is a mistake whatever the other values are."""
    points: list[Point] = []
    excluded: list[Point] = []
    zips: list[list[str]] = []
    exclusions = Exclusions()
    fingerprints: dict[object, str] = {}
    for overrides in jobs:
        composed = compose(overrides)
        config = typed(composed.settings)
        zips = config.sweep.zip
        if exclusions.leave_out(config, composed.choices):
            excluded.append(Point({}, list(overrides), None, None, None))
        else:
            points.append(_point(list(overrides), config, fingerprints))
    if excluded and not points:
        raise ConfigError(
            f"sweep.exclude: leaves out all of {len(excluded)} points, so there is nothing to run",
            *summary(exclusions.met),
        )
    everything = [*points, *excluded]
    _refuse_several_sweeps(everything)
    axes, common = varying([point.overrides for point in everything])
    for point in everything:
        point.axes.update((key, value) for key, value in _values(point.overrides).items() if key in axes)
    merged = _merge_duplicates(points)
    name = _sweep_name([point for point in merged if point.config], common)
    return Plan(
        name=name,
        points=[_name(point, name) for point in merged],
        axes=axes,
        common=common,
        zips=zips,
        duplicates=len(points) - len(merged),
        excluded=excluded,
        unmet=[condition for condition, count in exclusions.met.items() if not count],
    )


def varying(overrides: Sequence[Sequence[str]]) -> tuple[list[str], dict[str, str]]:
    """The keys with several values, and the values of the others."""
    values = [_values(each) for each in overrides]
    keys = list(dict.fromkeys(key for each in values for key in each))
    axes = [key for key in keys if len({each.get(key) for each in values}) > 1]
    return axes, {key: values[0][key] for key in keys if key not in axes}


def state(point: Point, queue: Queue | None) -> PointState:
    """Of its run, as its files and the queue tell; `invalid` where the point was refused."""
    return run_state(point.directory, point.directory.status(), queue) if point.run else "invalid"


def freeze(points: Sequence[Point]) -> None:
    """Writes the run directories of these points."""
    # Side by side, because a disk gathers the syncs that it is asked for at the same time.
    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(_freeze, points):
            pass


def _freeze(point: Point) -> None:
    assert point.config
    point.directory.freeze(point.config)


def command_line() -> list[str]:
    """The command that asked for this sweep: python -m pipeline, or python -m launchers resume."""
    module = "launchers" if Path(sys.argv[0]).parent.name == "launchers" else "pipeline"
    return [python(), "-m", module, *sys.argv[1:]]


def again(*changes: str) -> str:
    """The command to type for the same sweep, with changes such as hydra/launcher=slurm."""
    changed = tuple(change.partition("=")[0] + "=" for change in changes)
    return shlex.join([*(word for word in command_line() if not word.startswith(changed)), *changes])


def compare(sweep: str) -> str:
    """The command to type for the report on the sweep."""
    return shlex.join([python(), "-m", "analysis", sweep])


def _point(overrides: list[str], config: Config, fingerprints: dict[object, str]) -> Point:
    try:
        config = complete(config, fingerprints)
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


def _refuse_several_sweeps(points: Sequence[Point]) -> None:
    """What is of the sweep is no part of a run's result, so points that differ in it alone would silently
    become one."""
    given: dict[str, list[str]] = {}
    for override in (override for point in points for override in point.overrides):
        key, _, value = override.lstrip("+").partition("=")
        if key.startswith("sweep.") and value not in given.setdefault(key, []):
            given[key].append(value)
    for key, values in given.items():
        if len(values) > 1:
            raise ConfigError(
                f"{key}={','.join(values)}: a sweep has one {key.removeprefix('sweep.')}, such as "
                f"{key}={values[0]}; for several sweeps give the command once for each"
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
