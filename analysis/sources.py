"""Where the rows of a run are read from: its record, wandb's files beside it, or wandb's server.

Whatever the source, the rows are those of metrics.jsonl, each step from the latest attempt at it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from analysis import online
from analysis.online import OnlineRun
from analysis.records import COLUMNS, EMPTY, ROWS, latest, read_record, table
from analysis.wandb_files import read_run
from pipeline.config import Config, ConfigError, did_you_mean
from pipeline.store import RunDirectory, State, Status, python, thawed

OFFLINE = "wandb-offline"
ONLINE = "wandb:"

STATES: dict[str, State] = {  # by wandb's words
    "finished": "DONE",
    "failed": "FAILED",
    "crashed": "FAILED",
    "killed": "CANCELLED",
    "running": "RUNNING",
    "pending": "PENDING",
    "preempting": "PREEMPTED",
    "preempted": "PREEMPTED",
}


@dataclass(frozen=True)
class Log:
    """What a source holds of one run."""

    # Columns of records.ROWS, in the order of training.
    rows: pl.DataFrame = field(default_factory=lambda: EMPTY)
    every: int = 1  # one training step in so many was to be in it
    damage: list[str] = field(default_factory=list)  # a line for each file of which something is lost
    problem: str | None = None  # why there is none
    url: str | None = None  # of its page
    config: Config | None = None  # what the source knows of a run whose directory is elsewhere
    status: Status | None = None  # the same

    @functools.cached_property
    def trained(self) -> list[float]:
        """The training steps in it."""
        return self.rows.filter(pl.col("train/loss").is_not_null())["step"].to_list()

    @property
    def steps(self) -> int:
        """How many training steps there were, from the first in it to its last row."""
        return int(self.rows["step"][-1] - self.trained[0]) + 1 if self.trained else 0


Logs = Mapping[str, Log]  # by run


@dataclass(frozen=True)
class Origin:
    """Where rows come from."""

    name: str
    place: str  # what is read, in words
    folder: str = ""  # of the report, within that of the record, which knows more


@dataclass(frozen=True)
class Source:
    """`read`: the logs of these runs. `cautions`: what a reader must know of all its logs; raises ConfigError
    when they hold nothing at all."""

    origin: Origin
    read: Callable[[Sequence[RunDirectory]], Logs]
    cautions: Callable[[Sequence[Log]], list[str]]


def source(name: str) -> Source:
    """Raises ConfigError with the nearest name when there is none of this name."""
    if name.startswith(ONLINE):
        return _online(name.removeprefix(ONLINE))
    if name in SOURCES:
        return SOURCES[name]
    raise ConfigError(
        f"--source {name}: no such source." + did_you_mean(name, list(SOURCES)),
        f"Sources: {', '.join(SOURCES)}, {ONLINE}ENTITY/PROJECT",
    )


T = TypeVar("T")


def attempt(read: Callable[[], T], path: Path) -> tuple[T | None, str | None]:
    """What `read` returns, or why the file cannot be read: one damaged run must not hide the others."""
    try:
        return read(), None
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return None, f"{path.name} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def damage_notes(what: str, lines: Sequence[str]) -> list[str]:
    """One sentence of all these lines, or none of none."""
    if not lines:
        return []
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return [f"{what}, read as far as possible: {'; '.join(lines[:3])}{more}."]


def _damage(logs: Sequence[Log]) -> list[str]:
    return [line for log in logs for line in log.damage]


# --- the record ------------------------------------------------------------------------------------------


def _read_record(run: RunDirectory) -> Log:
    found, problem = attempt(functools.partial(read_record, run.metrics_file), run.metrics_file)
    if found is None:
        return Log(problem=problem)
    log = Log(found[0], damage=found[1])
    if log.trained and (gaps := int(log.trained[-1] - log.trained[0]) + 1 - len(set(log.trained))):
        log.damage.append(f"{run.id}/{run.metrics_file.name}: steps that are missing: {gaps:,}")
    return log


# --- wandb's files ---------------------------------------------------------------------------------------

# One folder for each attempt; where wandb failed to start it holds no such file.
WANDB_FILES = "wandb/*run-*/run-*.wandb"


def _read_wandb(run: RunDirectory) -> Log:
    paths = sorted(run.path.glob(WANDB_FILES))
    files, problem = attempt(lambda: [read_run(path, set(COLUMNS)) for path in paths], run.path / WANDB_FILES)
    if files is None:
        return Log(problem=problem)
    rows = table(itertools.chain.from_iterable(file.rows for file in files))
    every = max((file.config.get("track.every", 1) for file in files), default=1)
    return Log(_in_order(rows), every, [file.warning for file in files if file.warning])


def _in_order(rows: pl.DataFrame) -> pl.DataFrame:
    """Of several attempts, in whatever order they come. A row without a step is none of ours."""
    rows = rows.filter(pl.col("step").is_not_null() & pl.col("attempt").is_not_null())
    return latest(rows.sort("attempt", maintain_order=True)).select(COLUMNS)


def _wandb_cautions(logs: Sequence[Log]) -> list[str]:
    if not any(len(log.rows) for log in logs) and not any(log.problem for log in logs):
        raise ConfigError(
            f"--source wandb-offline: no run of this sweep has rows in runs/*/{WANDB_FILES}; track=disabled "
            f"writes none. The record has them in any case: --source record"
        )
    return [
        *_partial("The wandb files hold", logs),
        *damage_notes("Damaged wandb files", _damage(logs)),
    ]


def _partial(subject: str, logs: Sequence[Log]) -> list[str]:
    partial = [log for log in logs if len(log.trained) < log.steps]
    if not partial:
        return []
    held, steps = sum(len(log.trained) for log in partial), sum(log.steps for log in partial)
    every = max(log.every for log in partial)
    why = f"one in {every}: track.every={every}" if every > 1 else "the others never reached them"
    return [
        f"{subject} {held:,} of {steps:,} training steps ({why}), on which training losses, "
        f"batch sizes and curves rest; --source record has every step."
    ]


# --- wandb's server --------------------------------------------------------------------------------------

_RUNS_PER_QUERY = 200


def _online(project: str) -> Source:
    def cautions(logs: Sequence[Log]) -> list[str]:
        if not any(log.url for log in logs):
            raise ConfigError(
                f"--source {ONLINE}{project}: has no run of this sweep; they are told by their wandb ids, "
                f"<run>-a<attempt>",
                f"Upload what was logged offline: {python()} -m launchers sync SWEEP. Without wandb: "
                f"--source record",
            )
        lost = [log.problem for log in logs if log.problem]
        again = [f"Not fetched, which the same command tries again: {'; '.join(lost[:3])}."] if lost else []
        return [
            *again,
            *_partial(f"The runs in {project} hold", logs),
            *damage_notes("Histories that did not come whole", _damage(logs)),
        ]

    name = ONLINE + project
    origin = Origin(name, name, re.sub(r"[^\w.-]", "-", name))
    return Source(origin, lambda runs: _read_online(project, runs), cautions)


def _read_online(project: str, runs: Sequence[RunDirectory]) -> Logs:
    ids = [run.id for run in runs]
    # Of these ids, whatever their group: a run may have been logged by another sweep.
    filters = [
        {"name": {"$regex": f"^({'|'.join(ids[start : start + _RUNS_PER_QUERY])})-a[0-9]+$"}}
        for start in range(0, len(ids), _RUNS_PER_QUERY)
    ]
    found = online.fetch(project, filters)
    return {id_: _online_log([run for run in found if run.id.rpartition("-a")[0] == id_]) for id_ in ids}


def _online_log(attempts: list[OnlineRun]) -> Log:
    if not attempts:
        return Log()
    attempts = sorted(attempts, key=lambda run: int(run.id.rpartition("-a")[2]))
    last = attempts[-1]
    config, _ = attempt(functools.partial(_config, last.config), Path("config"))
    status = _status(last, config)
    if problem := next((f"{run.id}: {run.problem}" for run in attempts if run.problem), None):
        return Log(problem=problem, url=last.url, config=config, status=status)
    tables = [run.rows.select(ROWS.keys() & set(run.rows.columns)) for run in attempts]
    rows = pl.concat([pl.DataFrame(schema=ROWS), *tables], how="diagonal")
    return Log(
        _in_order(rows),
        every=max(int(run.config.get("track.every", 1)) for run in attempts),
        damage=[run.warning for run in attempts if run.warning],
        url=last.url,
        config=config,
        status=status,
    )


def _config(logged: Mapping[str, Any]) -> Config:
    """The config of a run from its flat form, to which the tracker added two keys."""
    tree: dict[str, Any] = {}
    for key, value in logged.items():
        if key not in ("run", "attempt"):
            *groups, leaf = key.split(".")
            group = tree
            for name in groups:
                group = group.setdefault(name, {})
            group[leaf] = value
    return thawed(tree)


def _status(run: OnlineRun, config: Config | None) -> Status:
    return Status(
        STATES.get(run.state, "FAILED"),
        attempt=int(run.id.rpartition("-a")[2]),
        step=_highest(run, "step"),
        tokens_seen=_highest(run, "tokens"),
        budget_tokens=config.budget_tokens if config else 0,
        error=None if run.state in ("finished", "running") else f"{run.state}, says wandb",
    )


def _highest(run: OnlineRun, counter: str) -> int:
    return int(run.rows[counter].max() or 0) if counter in run.rows.columns else 0  # type: ignore[arg-type]


def _each(read: Callable[[RunDirectory], Log]) -> Callable[[Sequence[RunDirectory]], Logs]:
    return lambda runs: {run.id: read(run) for run in runs}


SOURCES = {
    found.origin.name: found
    for found in (
        Source(
            Origin("record", "runs/*/metrics.jsonl"),
            _each(_read_record),
            lambda logs: damage_notes("Damaged records", _damage(logs)),
        ),
        Source(
            Origin(OFFLINE, f"runs/*/{WANDB_FILES}", OFFLINE),
            _each(_read_wandb),
            _wandb_cautions,
        ),
    )
}
