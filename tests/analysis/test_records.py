"""The record as a table is the record as pipeline.store reads it; what is kept of it never stands in for another."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from analysis import cache
from analysis.load import load_sweep
from analysis.records import COLUMNS, latest, read_record, table
from analysis.report import build
from analysis.summary import run_numbers
from pipeline.store import MetricsWriter, Row, RunDirectory, read_rows, supersede
from tests.analysis.synthetic import Point, short_run, write_sweep

COUNTLESS = [column for column in COLUMNS if column not in ("step", "attempt")]
NUMBERS = st.one_of(st.floats(), st.integers(-(2**53), 2**53))
ROWS = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(0, 12), "attempt": st.integers(1, 5)},
        optional={**dict.fromkeys(COUNTLESS, NUMBERS), "batch/reason": st.text(max_size=5)},
    ),
    max_size=30,
)


def same(rows: pl.DataFrame, expected: list[Row]) -> bool:
    return rows.equals(table(expected))


def write(path: Path, rows: list[Row]) -> Path:
    writer = MetricsWriter(path)
    for row in rows:
        writer.write(row)
    writer.close()
    return path


@given(rows=ROWS)
def test_what_later_attempts_replace_is_what_the_store_says(rows: list[Row]) -> None:
    assert same(latest(table(rows)), supersede(rows))


@given(rows=ROWS, seed=st.integers())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_is_read_as_the_store_reads_it(home: Path, rows: list[Row], seed: int) -> None:
    path = home / "runs" / f"r{seed}" / "metrics.jsonl"
    path.unlink(missing_ok=True)
    write(path, rows)
    for _ in range(2):  # from the file, then from what was kept
        found, lost = read_record(path)
        assert same(found, RunDirectory(path.parent).rows()) and lost == []


def test_no_record_is_no_rows(home: Path) -> None:
    assert len(read_record(home / "runs/r/metrics.jsonl")[0]) == 0


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 5, "tokens": 12',  # torn
        b'{"step": 5, "attempt": 1, "tokens": 1',
        b'{"step": 5, "attempt": 1, "tokens": tr\n',
        b"\x00\x00\x00\x00\n",
        b"\n",
        b"[1]\n",
        b'{"attempt": 1}\n',
        b'{"step": 5}\n',
        b'{"step": "NaN", "attempt": 1}\n',
        b'{"step": 5, "attempt": 1, "val/loss": "low"}\n',
        b'{"step": 5, "attempt": 1, "val/loss": true}\n',
        b'{"step": 5, "attempt": 1, "val/loss": NaN}\n',
        b'{"step": 5, "attempt": 1, "batch/reason": "\xff"}\n',
    ],
)
@pytest.mark.parametrize("rest", [b"", b'{"step": 6, "attempt": 1}\n'])
def test_what_is_no_row_ends_the_record(home: Path, line: bytes, rest: bytes) -> None:
    path = write(home / "runs/r/metrics.jsonl", short_run(2.0))
    whole = read_rows(path)
    with open(path, "ab") as file:
        file.write(line + rest)
    for _ in range(2):
        rows, (lost,) = read_record(path)
        assert same(rows, whole)
        assert lost == f"r/metrics.jsonl: {len(line + rest)} of {path.stat().st_size:,} bytes cannot be read"


@pytest.mark.parametrize("seed", range(20))
def test_a_record_cut_anywhere_yields_the_rows_before(home: Path, seed: int) -> None:
    numbers = random.Random(seed)
    values: list[Any] = [math.nan, math.inf, -math.inf, 1e-320, 0, 2**53, numbers.random()]
    rows = [{"step": i, "attempt": 1, "val/loss": numbers.choice(values)} for i in range(20)]
    path = write(home / "runs/r/metrics.jsonl", rows)
    size = numbers.randrange(path.stat().st_size)
    os.truncate(path, size)
    found, lost = read_record(path)
    assert same(found, read_rows(path))
    assert bool(lost) == (path.read_bytes()[-1:] not in (b"", b"\n"))


def test_a_cut_record_is_told_and_a_damaged_one_does_not_hide_its_beginning(home: Path) -> None:
    points = [
        Point({"batch": "constant_16", "seed": "0"}, short_run(2.0)),
        Point({"batch": "constant_16", "seed": "1"}, short_run(2.0)[:3], "FAILED", "out of memory"),
    ]
    write_sweep("s", points)
    files = [RunDirectory(home / "runs" / str(run.id)).metrics_file for run in load_sweep("s").runs]
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-20])
    sweep = load_sweep("s")
    assert [run.state for run in sweep.runs] == ["DONE", "FAILED"]
    assert run_numbers(sweep.rows)[0].val_loss is None, "the last row, the evaluation, is lost"
    assert sweep.record.filter(pl.col("point") == 1).height == 2
    (caution,) = sweep.cautions
    assert caution.startswith(
        f"Damaged records, read as far as possible: {files[0].parent.name}/metrics.jsonl: "
    )
    assert f"; {files[1].parent.name}/metrics.jsonl: " in caution
    assert caution in build(sweep, [], 0.0).cautions


# --- what is kept ----------------------------------------------------------------------------------------


def test_a_record_is_read_once_and_again_when_it_grows(home: Path) -> None:
    path = write(home / "runs/r/metrics.jsonl", short_run(2.0))
    first, _ = read_record(path)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"2.0", b"9.0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_record(path)[0].equals(first), "the file was read again, though nothing says that it changed"
    write(path, [{"step": 9, "attempt": 1, "val/loss": 1.0}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as on a disk whose clock is coarse
    assert same(read_record(path)[0], read_rows(path))


def test_another_content_of_the_same_size_is_read(home: Path) -> None:
    path = write(home / "runs/r/metrics.jsonl", short_run(2.0))
    read_record(path)
    path.write_bytes(path.read_bytes().replace(b"2.0", b"9.0"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    assert read_record(path)[0]["val/loss"][-1] == 9.0


def test_two_homes_with_the_same_run_do_not_share(home: Path) -> None:
    paths = [
        write(home / place / "runs/r/metrics.jsonl", short_run(loss))
        for place, loss in (("a", 2.0), ("b", 3.0))
    ]
    for path in paths:
        os.utime(path, ns=(0, 0))
    assert [read_record(path)[0]["val/loss"][-1] for path in paths] == [2.0, 3.0]


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_damaged_or_deleted_cache_is_no_hindrance(home: Path, damage: bytes | None) -> None:
    path = write(home / "runs/r/metrics.jsonl", short_run(2.0))
    first, _ = read_record(path)
    kept = cache.place("record", name="r")
    data = kept.read_bytes()
    if damage is None:
        kept.write_bytes(data[: len(data) // 2])
    else:
        kept.write_bytes(damage)
    assert read_record(path)[0].equals(first)
    assert kept.read_bytes() == data
    kept.unlink()
    assert read_record(path)[0].equals(first)


def test_a_disk_that_takes_no_more_keeps_nobody_from_reading(home: Path) -> None:
    (home / "cache").write_text("in the way")
    path = write(home / "runs/r/metrics.jsonl", short_run(2.0))
    assert same(read_record(path)[0], read_rows(path))


def test_only_the_first_lines_of_a_large_record_are_decoded_one_by_one(home: Path) -> None:
    """The fast way reads what the slow way reads: a record of which one line is no row."""
    rows = [{"step": i, "attempt": 1, "train/loss": random.Random(i).random()} for i in range(500)]
    path = write(home / "runs/r/metrics.jsonl", rows)
    fast, _ = read_record(path)
    with open(path, "ab") as file:
        file.write(json.dumps({"step": 500}).encode() + b"\n")
    slow, lost = read_record(path)
    assert slow.equals(fast) and lost
