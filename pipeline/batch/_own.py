"""Schedules of a user's own: one file each, in the directory that CRESCENDO_SCHEDULES names.

    batch=mine             the file mine.py there: a class `Schedule`, and for settings of its own a dataclass
                           `Settings`, every field with its default
    batch.own.power=0.5    one of those settings
    mine@3f2a9c01d2        the `batch.schedule` of a config: with the first digits of the SHA-256 of the file,
                           so that another rule is another run

A run directory holds a copy of the file. Its attempts execute that one, wherever they are, so what is edited
after a run was frozen changes nothing of it. Only composing, checking and training execute the file: what
reads records and configs does not, and gets by with `SETTINGS`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import traceback
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.batch._adaptive import GUARDS

if TYPE_CHECKING:
    from pipeline.config import BatchConfig

VARIABLE = "CRESCENDO_SCHEDULES"
# What they may read of the batch group, and what is in the id of their runs whether one reads it or not: the
# id must not need the file, and a setting that a later version adds must not change it.
SETTINGS = GUARDS | {"estimator", "direction", "signal", "own"}
_DIGITS = 10  # as many as a run's id has
_METHODS = ("check", "start", "wants_statistics", "decide")

_files: dict[str, Path] = {}  # where the source of a version can be read


def directory() -> Path | None:
    """Raises ConfigError when the one that is named is not there."""
    from pipeline.config import ConfigError

    named = os.environ.get(VARIABLE)
    if not named:
        return None
    path = Path(named).expanduser().absolute()
    if not path.is_dir():
        raise ConfigError(f"{VARIABLE}={named}: no such directory")
    return path


def options() -> list[str]:
    """What `batch=` may be besides the options of conf/batch. Raises ConfigError for a file that bears the
    name of one of those, or that cannot be named in an override."""
    from pipeline.config import ConfigError
    from pipeline.overrides import CONF

    if (here := directory()) is None:
        return []
    files = sorted(file for file in here.glob("*.py") if not file.stem.startswith("_"))
    if unfit := [file for file in files if not re.fullmatch(r"[\w.-]+", file.stem)]:
        raise ConfigError(
            *(f"{f}: batch={f.stem} cannot be typed. Name it with letters, digits and _ alone" for f in unfit)
        )
    taken = {
        path.stem for folder in ("conf/batch", "pipeline/batch") for path in (CONF.parent / folder).iterdir()
    }
    if shadows := [file for file in files if file.stem in taken]:
        raise ConfigError(
            *(f"{f}: batch={f.stem} is a schedule of Crescendo's. Rename the file" for f in shadows)
        )
    return [file.stem for file in files]


def option(name: str) -> dict[str, Any]:
    """The settings that `batch=NAME` chooses: the version of the file as it is now, and its defaults."""
    here = directory()
    assert here is not None
    file = here / f"{name}.py"
    version = f"{name}@{_digest(file.read_bytes())}"
    note(version, file)
    settings = _settings(version)
    return {
        "schedule": version,
        "own": {f.name: getattr(settings(), f.name) for f in fields(settings)} if settings else {},
    }


def is_own(schedule: str) -> bool:
    """Whether a `batch.schedule` is a version of a user's file."""
    return "@" in schedule


def note(schedule: str, file: Path) -> None:
    """That the source of a version, if it is one, can be read here."""
    if is_own(schedule):
        _files.setdefault(schedule, file)


def versions() -> list[str]:
    """Those known in this process."""
    return sorted(_files)


def keys() -> list[str]:
    """Of their settings, as far as they are loaded."""
    chosen = filter(None, map(_settings, versions()))
    return [f"batch.own.{field.name}" for settings in chosen for field in fields(settings)]


@functools.cache
def source(version: str) -> bytes:
    """Of the file. Raises ConfigError when it is not what it was when the version was named."""
    from pipeline.config import ConfigError

    file = _files[version]
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; it is the schedule of batch.schedule={version}") from None
    if (found := _digest(text)) != version.partition("@")[2]:
        raise ConfigError(f"{file}: was changed: its SHA-256 begins with {found}, not as in {version}")
    return text


@functools.cache
def load(version: str) -> ModuleType:
    """The file, executed. Raises ConfigError, with the line, when that fails or it is no schedule."""
    from pipeline.config import ConfigError

    file, text = _files[version], source(version)
    module = ModuleType(f"crescendo_schedules.{version}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses and type hints look names up
    try:
        exec(compile(text, str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{file}, line {_line(error, file)}: {type(error).__name__}: {error}") from error
    if problems := _problems(module):
        raise ConfigError(*(f"{file}: {problem}" for problem in problems))
    if hasattr(module, "Settings"):
        module.Schedule.settings |= {"own"}
    return module


def completed(batch: BatchConfig) -> BatchConfig:
    """With `own` as the schedule's `Settings` have it: every field, of its type. Raises ConfigError."""
    from pipeline.config import parse_group, to_tree

    if not is_own(batch.schedule) or batch.schedule not in _files:
        return batch
    settings = _settings(batch.schedule)
    return replace(batch, own=to_tree(parse_group(settings, batch.own, "batch.own")) if settings else {})


def _settings(version: str) -> type | None:
    settings: type | None = getattr(load(version), "Settings", None)
    return settings


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:_DIGITS]


def _line(error: BaseException, file: Path) -> int | None:
    """The last one of the file that was at work."""
    if isinstance(error, SyntaxError):
        return error.lineno
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    return lines[-1] if lines else None


def _problems(module: ModuleType) -> list[str]:
    schedule, settings = getattr(module, "Schedule", None), getattr(module, "Settings", None)
    if not isinstance(schedule, type):
        return ["defines no class Schedule"]
    problems = [
        f"class Schedule has no {name}()" for name in _METHODS if not callable(getattr(schedule, name, None))
    ]
    read = getattr(schedule, "settings", None)
    if not isinstance(read, frozenset):
        problems.append("class Schedule has no `settings`, a frozenset of the batch.* settings that it reads")
    elif unknown := sorted(read - SETTINGS):
        allowed = ", ".join(sorted(SETTINGS - {"own"}))
        problems.append(
            f"its `settings` hold {', '.join(unknown)}. Allowed: {allowed}; others are fields of its "
            f"dataclass Settings"
        )
    if settings is None:
        return problems
    if not (isinstance(settings, type) and is_dataclass(settings)):
        return [*problems, "Settings is no dataclass"]
    try:
        settings()
    except TypeError:
        problems.append("every field of Settings needs a default")
    return problems
