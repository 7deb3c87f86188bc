"""metrics.jsonl: the record of a run, one row per line."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.store.files import report, sync_directory

Row = dict[str, Any]
_TAIL_BYTES = 16384  # holds some twenty rows


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


def last_row(path: Path) -> Row | None:
    """The newest training row, read from the end of the record: cheap enough for a live table, which passes
    over damaged lines."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1 if file.tell() > _TAIL_BYTES else 0 : -1]
    except FileNotFoundError:
        return None
    rows = (_row_of(line) for line in reversed(lines))
    return next((row for row in rows if row and "train/loss" in row), None)


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
