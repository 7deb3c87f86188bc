"""The run directory: frozen config, status, lock and the metrics record.

    runs/<id>/config.yaml  status.json  metrics.jsonl  checkpoints/  wandb/  logs/  lock  stop
              schedule.py      of a run whose batch schedule is a user's own

Everything a reader may see is replaced atomically or appended as one whole line, so a reader (or a restart
after kill -9) never meets half a file. What a full disk refuses is tried again, and nothing half-written
is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import typing
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import yaml

from pipeline.batch import _own as own_schedules
from pipeline.config import Config, ConfigError, parse, to_tree
from pipeline.identity import run_id

State = Literal["PENDING", "RUNNING", "DONE", "FAILED", "PREEMPTED", "CANCELLED"]
StopState = Literal["CANCELLED", "PREEMPTED"]
Row = dict[str, Any]

_CHECKPOINT = re.compile(r"step-\d+")
_ATTEMPT = re.compile(r"attempt-(\d+)\.")
_SEAL = re.compile(r"# frozen, crc32 ([0-9a-f]{8})\n")

# libyaml's, several times as fast, where PyYAML was built with it.
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAIL_BYTES = 16384  # holds some twenty rows
_GLANCE_S = 0.2  # `is_locked` takes the lock for a moment; a taker waits that long before it gives up


def home() -> Path:
    """Where runs/, sweeps/, reports/, corpora/, optima/ live: CRESCENDO_HOME, else the current directory."""
    return Path(os.environ.get("CRESCENDO_HOME") or ".").resolve()


def python() -> str:
    """What to type for the interpreter that runs now, which knows this project's packages.

    The `python` that a shell finds may be another: after `make demo` it is not .venv/bin/python. A virtual
    environment's python links to the one it was made from, so the directory tells them apart, not the file.
    """
    found, this = shutil.which("python"), Path(sys.executable)
    if found and os.path.samefile(found, this) and os.path.samefile(Path(found).parent, this.parent):
        return "python"
    return str(this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this)


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
    conf = Path(__file__).resolve().parents[1] / "conf"
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` whole: a reader sees the old or the new content, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


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


def sync_directory(path: Path) -> None:
    """The names in this directory as they are now survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def report(line: str) -> None:
    """Prints a line at once. The output is often a log in the run directory: a full disk, of which the line
    may well tell, must not end the run. What was refused comes before the next line, up to some kilobytes."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


@dataclass(frozen=True)
class Status:
    """status.json. Times are Unix seconds; `error` is one line, the whole story is in logs/."""

    state: State
    attempt: int = 0
    step: int = 0
    tokens_seen: int = 0
    budget_tokens: int = 0
    unit: str = "tokens"  # what the two count, in words
    started: float | None = None
    updated: float | None = None
    host: str | None = None
    job: str | None = None
    mesh: str | None = None
    exit_code: int | None = None
    error: str | None = None


@functools.cache
def _status_types() -> dict[str, Any]:
    numbers = {float | None: float | int | None}  # JSON writes 1.0 as it likes
    hints = typing.get_type_hints(Status)
    return {name: numbers.get(hint, hint) for name, hint in hints.items() if name != "state"}


def _status_of(text: str) -> Status:
    """Raises ValueError for what is no status.json."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.get("state") not in get_args(State):
        raise ValueError("it names no state")
    types = _status_types()
    if unknown := tree.keys() - types.keys() - {"state"}:
        raise ValueError(f"it holds {', '.join(sorted(unknown))}")
    for key, kind in types.items():
        if key in tree and not isinstance(tree[key], kind):
            raise ValueError(f"{key}: {tree[key]!r}")
    return Status(**tree)


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
        return _status_of(self.status_file.read_text(encoding="utf-8"))

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
        """The newest training row, read from the end of the record: cheap enough for a live table, which
        passes over damaged lines."""
        try:
            with open(self.metrics_file, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().split(b"\n")[1 if file.tell() > _TAIL_BYTES else 0 : -1]
        except FileNotFoundError:
            return None
        rows = (_row_of(line) for line in reversed(lines))
        return next((row for row in rows if row and "train/loss" in row), None)


def try_lock(file: TextIO, kind: int) -> bool:
    """Whether this process now holds the lock: fcntl.LOCK_EX, or LOCK_SH beside others."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_rows(path: Path) -> list[Row]:
    """Every whole line of a metrics.jsonl, in order; a torn last line is left out. Raises ConfigError for one
    that is no row."""
    return list(each_row(path))


def each_row(path: Path) -> Iterator[Row]:
    """The same one after another: a record of a million steps need not be in memory."""
    try:
        yield from _rows_before_damage(path)
    except _NoRow as damage:
        raise ConfigError(
            f"{path}, line {damage.number}: is no row of a record. Bring the file back from a copy; without "
            f"one, delete {path.parent} to train the run again"
        ) from None


class _NoRow(Exception):
    """A line of a record is none of its rows."""

    def __init__(self, number: int, offset: int) -> None:
        self.number, self.offset = number, offset  # of the line, from 1; in bytes


def _rows_before_damage(path: Path) -> Iterator[Row]:
    """The rows of a metrics.jsonl up to the first line that is none. Raises _NoRow for that."""
    offset = 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if (row := _row_of(line)) is None:
                raise _NoRow(number, offset)
            yield row
            offset += len(line)


def _row_of(line: bytes) -> Row | None:
    """None: the line is no row of a record."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or any(type(row.get(key)) is not int for key in ("step", "attempt")):
        return None
    return decode(row)


def supersede(rows: list[Row]) -> list[Row]:
    """Without what a later attempt did again: an attempt that starts at step s replaces all earlier rows
    at s and after."""
    first_step: dict[int, int] = {}
    for row in rows:
        first_step[row["attempt"]] = min(row["step"], first_step.get(row["attempt"], row["step"]))
    return [
        row
        for row in rows
        if all(attempt <= row["attempt"] or row["step"] < step for attempt, step in first_step.items())
    ]


class MetricsWriter:
    """Appends rows to metrics.jsonl, each as one whole line.

    Rows that a full disk refuses wait in memory, in order, and are tried again with the next one: a run does
    not end for want of a few bytes.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._waiting = bytearray()  # whole lines, but for the first, whose beginning may be in the file
        self._warned = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        sync_directory(path.parent)
        data = path.read_bytes()
        if not data.endswith(b"\n"):  # a write torn by a full disk or a power cut
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)

    def go_on_after(
        self,
        step: int,
        seconds: float = 0.0,
        first: int | None = 1,
        evaluation_tokens: int | None = None,
    ) -> None:
        """Sees to it that all rows up to this step are there: of training from step `first` (None: the first
        there is), and of an evaluation wherever `evaluation_tokens` were passed. That of the step itself is
        the one written when `seconds` of training were over: an earlier attempt may have done the same steps,
        and its rows are not those that led there. A damaged line after them, which a power cut may leave, is
        cut off with the rest: all that is trained again.

        Raises ConfigError when rows are lost that no attempt will write again.
        """
        damage: _NoRow | None = None
        trained: dict[int, int] = {}  # tokens by step
        evaluated: set[int] = set()
        ended: float | None = None  # after so many seconds of training, that step
        try:
            for row in _rows_before_damage(self._path):
                number = row["step"]
                if "train/loss" in row:
                    trained[number] = row.get("tokens", 0)
                    evaluated.discard(number)  # by an attempt that this one replaces
                    ended = row.get("time") if number == step else ended
                if "val/loss" in row:
                    evaluated.add(number)
        except _NoRow as found:
            damage = found

        def passed(number: int) -> bool:
            tokens = evaluation_tokens
            return tokens is not None and trained[number] // tokens > trained[number - 1] // tokens

        lost: str | None = None
        begin = min(trained, default=1) if first is None else first
        for number in range(begin, step + 1):
            if number not in trained or (number > begin and passed(number) and number not in evaluated):
                lost = f"step {number} is missing"
                break
        if not lost and step and ended != seconds:
            lost = f"step {step} as its checkpoint has it is missing"
        if lost:
            where = f"line {damage.number} is no row" if damage else lost
            raise ConfigError(
                f"{self._path}: {where}, and the run would go on after step {step}. Bring the file "
                f"back from a copy, or delete {self._path.parent / 'checkpoints'} to train it all again"
            )
        if damage:
            report(f"{self._path.name}: line {damage.number} is no row; cut off there, after step {step}")
            os.ftruncate(self._fd, damage.offset)

    def write(self, row: Row) -> None:
        self._waiting += (json.dumps(_encode(row), allow_nan=False) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            if not self._warned:
                report(f"{error}; the run goes on and keeps its rows in memory until they can be written")
            self._warned = True

    def flush(self) -> None:
        """Writes what waits. Raises OSError, with the number of rows, when it cannot be written."""
        try:
            while self._waiting:
                del self._waiting[: os.write(self._fd, self._waiting)]
        except OSError as error:
            rows = self._waiting.count(b"\n")
            message = f"{self._path.name}: {rows} rows could not be written ({error.strerror})"
            raise OSError(error.errno, message) from error

    def sync(self) -> None:
        """Like `flush`; what was written survives a power cut, too."""
        self.flush()
        os.fsync(self._fd)

    def close(self) -> None:
        """Raises OSError when rows are left that cannot be written."""
        try:
            self.flush()
        finally:
            os.close(self._fd)


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(row: Row) -> Row:
    return {
        k: _non_finite_name(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }


def _non_finite_name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode(row: Row) -> Row:
    """NaN and infinities as floats, for which JSON has only names."""
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
