"""Rows of runs as tables: the columns that are read, the record, and what later attempts replace."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from analysis import cache
from pipeline.store import Row, decode

# Columns of the record that the analysis reads; a column that a row lacks is null.
COLUMNS = (
    "step",
    "tokens",
    "time",
    "sequences",
    "train/loss",
    "val/loss",
    "attempt",
    "batch/size",
    "batch/requested",
    "batch/accumulation",
    "stat/noise_scale",
    "epochs",
    "val/accuracy",
    "val/auc",
    "exact/gap",
    "exact/grad_norm",
    "val/loss_averaged",
    "val/accuracy_averaged",
    "val/auc_averaged",
    "gradient_evaluations",
    "loss_evaluations",
)

ROWS = {column: pl.Float64 for column in COLUMNS}
EMPTY = pl.DataFrame(schema=ROWS)

_NAMES = (b'"NaN"', b'Infinity"')  # of what JSON has no numbers for
_VERSION = 1  # raise it when the same file is read differently


def table(rows: Iterable[Row]) -> pl.DataFrame:
    """Rows as of pipeline.store."""
    rows = list(rows)
    return pl.DataFrame(
        {name: pl.Series([row.get(name) for row in rows], dtype=kind) for name, kind in ROWS.items()}
    )


def latest(rows: pl.DataFrame) -> pl.DataFrame:
    """As pipeline.store.supersede: an attempt that starts at step s replaces earlier rows at s and after."""
    first = rows.group_by("attempt").agg(pl.col("step").min()).sort("attempt", descending=True)
    if len(first) > 1:
        limits = first.select("attempt", limit=pl.col("step").cum_min().shift(1))
        rows = rows.join(limits, on="attempt", how="left", maintain_order="left")
        rows = rows.filter(pl.col("limit").is_null() | (pl.col("step") < pl.col("limit"))).drop("limit")
    return rows


def numbers(history: Iterable[Row]) -> pl.DataFrame:
    """What of a history is a number, as a table, sorted by `_step`.

    Files that were sent twice leave rows twice, with the same `_step` and the same counters.
    """
    decoded = map(decode, history)
    rows = [{key: value for key, value in row.items() if type(value) in (int, float)} for row in decoded]
    keys = dict.fromkeys(key for row in rows for key in row)
    table = pl.DataFrame({key: pl.Series([row.get(key) for row in rows], dtype=pl.Float64) for key in keys})
    if table.is_empty():
        return table
    same = [key for key in ("_step", "attempt", "step") if key in keys]
    return table.unique(same, keep="last", maintain_order=True).sort("_step", maintain_order=True)


def read_record(path: Path) -> tuple[pl.DataFrame, list[str]]:
    """The rows of a metrics.jsonl, each step from the latest attempt at it, and what of the file is lost.

    Read up to the first line that is no row. Without the file, no rows. Raises OSError.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return EMPTY, []
    with file:
        found = os.fstat(file.fileno())
        key: cache.Key = [
            _VERSION,
            str(path.resolve()),
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            *COLUMNS,
        ]
        kept = cache.place("record", name=path.parent.name)
        if (known := cache.load(kept, key)) is not None:
            return known
        data = file.read(found.st_size)  # no more, though it grows: the key holds for so much
    rows, lost = _rows(data)
    rows = latest(rows)
    notes = (
        [f"{path.parent.name}/{path.name}: {lost:,} of {len(data):,} bytes cannot be read"] if lost else []
    )
    cache.save(kept, key, rows, notes)
    return rows, notes


def _rows(data: bytes) -> tuple[pl.DataFrame, int]:
    """The rows up to the first line that is none, and how many bytes follow."""
    lines = data[: data.rfind(b"\n") + 1]
    rows = _parsed(lines)
    if rows is not None:
        return rows, len(data) - len(lines)
    slowly, end = [], 0
    for line in lines.split(b"\n")[:-1]:
        if (row := _row(line)) is None:
            break
        slowly.append(row)
        end += len(line) + 1
    return table(slowly), len(data) - end


def _parsed(lines: bytes) -> pl.DataFrame | None:
    """All at once, many times as fast as each line by itself; None when a line is no row."""
    # A column of numbers takes no names; one of texts, which is slower, takes numbers as well.
    kind = pl.String if any(name in lines for name in _NAMES) else pl.Float64
    try:
        rows = pl.read_ndjson(io.BytesIO(lines), schema=dict.fromkeys(ROWS, kind)).cast(pl.Float64)
    except pl.exceptions.PolarsError:
        return None
    counted = all(rows[key].is_finite().sum() == len(rows) for key in ("step", "attempt"))
    return rows if counted and len(rows) == lines.count(b"\n") else None


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    row = decode({key: value for key, value in row.items() if key in ROWS})
    numbers = all(value is None or type(value) in (int, float) for value in row.values())
    if not numbers or any(row.get(key) is None for key in ("step", "attempt")):
        return None
    return row if math.isfinite(row["step"]) and math.isfinite(row["attempt"]) else None


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
