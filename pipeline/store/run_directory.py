"""The run directory: frozen config, status, lock, wishes and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from pipeline.batch import _own as own_schedules
from pipeline.config import Config, ConfigError, parse, to_tree
from pipeline.identity import run_id
from pipeline.store.files import home, try_lock, write_atomically
from pipeline.store.metrics import Row, last_row, read_rows, supersede
from pipeline.store.status import Status, StopState, status_of

_CHECKPOINT = re.compile(r"step-\d+")
_ATTEMPT = re.compile(r"attempt-(\d+)\.")
_SEAL = re.compile(r"# frozen, crc32 ([0-9a-f]{8})\n")

# libyaml's, several times as fast, where PyYAML was built with it.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_GLANCE_S = 0.2  # `is_locked` takes the lock for a moment; a taker waits that long before it gives up


def thawed(tree: Mapping[str, Any]) -> Config:
    """The config of a run. What a run of an earlier version has no setting for it did not do. Raises
    ConfigError."""
    groups = {name: tree.get(name, {}) for name in _later_settings()}
    later = {
        name: {**settings, **groups[name]}
        for name, settings in _later_settings().items()
        if isinstance(groups[name], Mapping)
    }
    return parse({**tree, **later})


@functools.cache
def _later_settings() -> dict[str, dict[str, Any]]:
    """Settings that did not always exist, as they change nothing: their defaults."""
    conf = Path(__file__).resolve().parents[2] / "conf"
    defaults = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))
    return {
        "model": {"kind": "llama"},
        "data": {
            key: defaults["data"][key] for key in ("distribution", "samples", "features", "standardise")
        },
        "batch": {key: defaults["batch"][key] for key in ("form", "averaged_steps", "averaged_ratio", "own")},
        "sync": {key: value for key, value in defaults["sync"].items() if key != "method"},
        "optim": {key: value for key, value in defaults["optim"].items() if key != "name"},
        "imbalance": {**defaults["imbalance"], "kind": "none"},
        "track": {"exact_gradient": defaults["track"]["exact_gradient"]},
    }


def sealed(text: str) -> str:
    """With a first line by which a change is noticed."""
    return f"# frozen, crc32 {zlib.crc32(text.encode()):08x}\n{text}"


def _unsealed(text: str) -> str:
    """Raises ValueError when it was changed since. Earlier versions sealed nothing."""
    if not (seal := _SEAL.match(text)):
        return text
    text = text[seal.end() :]
    if zlib.crc32(text.encode()) != int(seal[1], 16):
        raise ValueError("its checksum differs")
    return text


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class AlreadyRunning(RuntimeError):
    """Another live process holds the run's lock."""


class RunDirectory:
    """runs/<id>. `RunDirectory.of(config)` names it, `freeze` creates it, the rest reads and writes it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.id = self.path.name
        self.config_file = self.path / "config.yaml"
        self.schedule_file = self.path / "schedule.py"
        self.status_file = self.path / "status.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.stop_file = self.path / "stop"

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        return cls(home() / "runs" / run_id(config))

    @classmethod
    def find(cls, id_or_path: str) -> RunDirectory:
        """The run with this id (or a unique beginning of it), or at this path. Raises ConfigError."""
        if (Path(id_or_path) / "config.yaml").exists():
            return cls(Path(id_or_path).resolve())
        runs = home() / "runs"
        found = (path.parent for path in runs.glob("*/config.yaml"))
        hits = sorted(path for path in found if path.name.startswith(id_or_path))
        if len(hits) == 1:
            return cls(hits[0])
        what = f"matches {len(hits)} runs" if hits else "no such run"
        raise ConfigError(f"{id_or_path}: {what} in {runs}")

    # config

    def exists(self) -> bool:
        """Also a half-deleted run does not: it cannot be executed any more."""
        return self.config_file.exists()

    def freeze(self, config: Config) -> None:
        """Writes config.yaml, and the batch schedule's file if it is a user's own: attempts read them and
        nothing else.

        The id fixes all that decides the result; asked for again, a run that is neither done nor running
        takes over what does not (launch, track, where the data lies).
        """
        try:
            with self.lock():
                status = self.status()
                schedule = config.batch.schedule
                if own_schedules.is_own(schedule) and not self.schedule_file.exists():
                    write_atomically(self.schedule_file, own_schedules.source(schedule))
                if status is None or status.state != "DONE":
                    text = yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False)
                    write_atomically(self.config_file, sealed(text))
                if status is None:
                    self.write_status(Status("PENDING", budget_tokens=config.budget_tokens, unit=config.unit))
        except AlreadyRunning:
            return

    def config(self) -> Config:
        """Raises ConfigError, also where the file is not what was frozen: a run of other settings would bear
        the same name."""
        try:
            tree = yaml.load(_unsealed(self.config_file.read_text(encoding="utf-8")), _Loader)
            if not isinstance(tree, Mapping):
                raise ValueError("it holds no settings")
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: holds no config.yaml, so it is no run directory") from None
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{self.config_file}: is not what was frozen ({_first_line(error)}). Bring it back from a "
                f"copy; or move {self.path} away and give the command that asked for the run: it begins again"
            ) from None
        try:
            config = thawed(tree)
        except ConfigError as error:
            raise ConfigError(
                f"{self.config_file}: cannot be read by this version", *error.problems
            ) from None
        own_schedules.note(config.batch.schedule, self.schedule_file)
        return config

    # status

    def status(self) -> Status | None:
        """None when nothing was started or submitted here.

        What is damaged counts as FAILED and says so: everything in it can be had again, and the run goes on
        when it is asked for again.
        """
        try:
            return self.read_status()
        except FileNotFoundError:
            return None
        except ValueError as error:
            lost = f"status.json cannot be read ({_first_line(error)}); the run goes on when asked for again"
            return Status("FAILED", attempt=self.newest_attempt(), error=lost)

    def read_status(self) -> Status:
        """As it is in the file. Raises FileNotFoundError, and ValueError for a damaged one."""
        return status_of(self.status_file.read_text(encoding="utf-8"))

    def newest_attempt(self) -> int:
        """The number of the last attempt; 0 before the first. The logs and the record know it, too: an
        attempt with a number that was there before would count as replaced by the one that had it."""
        named = (_ATTEMPT.match(path.name) for path in self.logs.glob("attempt-*"))
        found = [int(name[1]) for name in named if name]
        row = self.last_row()
        with contextlib.suppress(FileNotFoundError, ValueError):
            found.append(self.read_status().attempt)
        return max([*found, row["attempt"] if row else 0])

    def write_status(self, status: Status) -> None:
        status = dataclasses.replace(status, updated=time.time())
        write_atomically(self.status_file, json.dumps(dataclasses.asdict(status), indent=1) + "\n")

    def update_status(self, **changes: Any) -> None:
        try:
            status = self.read_status()
        except FileNotFoundError:
            status = Status("PENDING")
        except ValueError:  # damaged under the run
            status = Status("RUNNING", attempt=self.newest_attempt())
        self.write_status(dataclasses.replace(status, **changes))

    # lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run while the block runs. Raises AlreadyRunning, naming the holder, and ConfigError where
        nothing can be written.

        An flock: the kernel drops it when the holder dies, however it dies, so a dead holder's run is free
        at once and two takers cannot both win.
        """
        with self._lock_file() as file:
            deadline = time.monotonic() + _GLANCE_S
            while not try_lock(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise AlreadyRunning(f"run {self.id} is being run by {file.read().strip()}")
                time.sleep(_GLANCE_S / 10)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
            file.flush()
            yield

    def _lock_file(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return open(self.path / "lock", "a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written to ({error.strerror}). Make it writable, or name another "
                f"place with CRESCENDO_HOME"
            ) from error

    def is_locked(self) -> bool:
        """Whether a live process holds the run right now."""
        try:
            with open(self.path / "lock", encoding="utf-8") as file:
                return not try_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    # stop

    def request_stop(self, state: StopState = "CANCELLED") -> None:
        """Asks the ranks to save a checkpoint and end at the next step, in this state. A preempted run that
        is then cancelled is cancelled, not the other way round."""
        mode = "w" if state == "CANCELLED" else "x"
        with contextlib.suppress(FileExistsError), open(self.stop_file, mode, encoding="utf-8") as file:
            file.write(state)

    def stop_requested(self) -> StopState | None:
        try:
            wish = self.stop_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return "PREEMPTED" if wish == "PREEMPTED" else "CANCELLED"  # also when a full disk left it empty

    def clear_stop(self) -> None:
        self.stop_file.unlink(missing_ok=True)

    # checkpoints

    def complete_checkpoints(self) -> list[Path]:
        """Those that were written to the end, oldest first."""
        try:
            return sorted(path for path in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(path.name))
        except FileNotFoundError:
            return []

    # metrics

    def rows(self) -> list[Row]:
        """The record, one row per logged step: re-executed steps appear once, from the latest attempt.

        Raises ConfigError when it is damaged."""
        return supersede(read_rows(self.metrics_file))

    def last_row(self) -> Row | None:
        """The newest training row; None before the first."""
        return last_row(self.metrics_file)
