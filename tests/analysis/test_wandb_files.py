"""wandb's offline files: against wandb's own reader, and damaged in every way."""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, strategies

from analysis.wandb_files import BLOCK, HEADER, WandbRun, read_run
from analysis.wandb_messages import Record
from pipeline.config import ConfigError
from pipeline.store import Row, decode
from tests.analysis.wandb_log import exit_record, framed, history_record, messages, run_record

# Logs with wandb's real client what it is told.
CLIENT = """
import json, sys, wandb
encoding, rows, config = json.load(sys.stdin)
settings = wandb.Settings(console="off", silent=True, x_history_value_encoding=encoding)
run = wandb.init(
    mode="offline", project="p", id="the-id", name="a name", group="a group", tags=["x", "y"],
    config=config, settings=settings,
)
for row in rows:
    run.log(row)
run.config.update({"later": 5})
run.finish(exit_code=3)
"""
CONFIG = {"flat.dot": 1, "nested": {"lr": 1e-3, "betas": [0.9, 0.95]}, "none": None, "text": "é"}
MIXED: list[Row] = [
    {"int": 3, "float": 2.5, "third": 1 / 3, "whole": 2.0, "tiny": 5e-324, "large": 1.7976931348623157e308},
    {"exact": 2**53 + 1, "negative": -(2**53) - 1, "int64": 2**63 - 1, "wide": 2**70},
    {"nan": math.nan, "inf": math.inf, "minus": -math.inf},
    {"none": None, "true": True, "false": False, "text": 'a "quoted" line\nand é', "empty": "", "list": [1, 2.5]},
    {"nested": {"x": {"y": 1.5, "z": None}, "text": "in"}, "dot.ted": 4},
    {"long": "ab" * BLOCK},
    *({f"m/{i}": i + step / 7 for i in range(20)} for step in range(300)),
]  # fmt: skip


@pytest.fixture(scope="module", params=["json", "json,typed"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    told = json.dumps([request.param, MIXED, CONFIG])
    command = [sys.executable, "-c", CLIENT]
    subprocess.run(command, cwd=folder, env=environment, input=told, text=True, check=True, timeout=120)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


def inspected(file: Path) -> list[dict[str, Any]]:
    """Every record, as wandb's own reader finds it."""
    text = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    return [json.loads(line) for line in text.splitlines()]


def same(a: object, b: object) -> bool:
    """Equal in value and type, and in order; NaN equals NaN."""
    return repr(a) == repr(b)


def flat(row: Row) -> Row:
    """As wandb stores it: dictionaries as keys with dots."""
    found: Row = {}
    for key, value in row.items():
        inner = flat(value) if isinstance(value, dict) else {}
        found |= {f"{key}.{name}": leaf for name, leaf in inner.items()} or {key: value}
    return found


Reader = Callable[[bytes], WandbRun]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Reads a file of these bytes, run-x.wandb."""
    path = tmp_path_factory.mktemp("made-up") / "run-x.wandb"

    def write_and_read(data: bytes) -> WandbRun:
        path.write_bytes(data)
        return read_run(path)

    return write_and_read


# --- files that wandb wrote ------------------------------------------------------------------------------


def test_wandb_itself_reads_the_same(written: Path) -> None:
    run, records = read_run(written), inspected(written)
    rows = [decode(record["history"]["item"]) for record in records if record["type"] == "history"]
    assert len(run.rows) == len(rows)
    for mine, theirs in zip(run.rows, rows, strict=True):
        assert same(sorted(mine.items()), sorted(theirs.items()))
    (theirs,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run.id, run.name) == (theirs["run_id"], theirs["display_name"])
    assert (run.group, run.tags) == (theirs["run_group"], theirs["tags"])
    assert run.started == pytest.approx(datetime.fromisoformat(theirs["start_time"]).timestamp(), abs=1e-5)
    updates = [record["config"]["update"] for record in records if record["type"] == "config"]
    config = functools.reduce(operator.or_, [theirs["config"]["update"], *updates])
    assert same(sorted(run.config.items()), sorted(flat(without_own(config)).items()))
    assert [run.exit_code] == [r["exit"]["exit_code"] for r in records if r["type"] == "exit"]


def without_own(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key.split(".")[0] != "_wandb"}


def test_rows_are_those_that_were_logged(written: Path) -> None:
    rows = read_run(written).rows
    assert len(rows) == len(MIXED)
    for step, (row, logged) in enumerate(zip(rows, MIXED, strict=True)):
        assert row.pop("_step") == step and row.pop("_timestamp") > 0 and row.pop("_runtime") >= 0
        assert row.keys() == flat(logged).keys()
        for key, value in flat(logged).items():
            assert row[key] == value or same(row[key], value), key  # the client writes 2.0 as 2
            assert isinstance(row[key], bool) == isinstance(value, bool)


def test_the_run_is_described(written: Path) -> None:
    run = read_run(written)
    assert (run.id, run.name, run.group, run.tags) == ("the-id", "a name", "a group", ["x", "y"])
    assert run.config == {**flat(CONFIG), "later": 5}
    assert (run.exit_code, run.warning) == (3, None)


def test_only_the_metrics_that_are_asked_for(written: Path) -> None:
    whole, some = read_run(written), read_run(written, {"m/3", "nested.x.y"})
    assert some.rows == [{"nested.x.y": 1.5}, *({"m/3": row["m/3"]} for row in whole.rows[6:])]
    assert some.config == whole.config


# --- files that are made up ------------------------------------------------------------------------------


@given(strategies.lists(strategies.integers(0, 3 * BLOCK), max_size=6), strategies.integers(0, 2**32))
def test_records_of_any_length_come_back(read: Reader, sizes: list[int], seed: int) -> None:
    """Also those whose ends fall on the last bytes of a block."""
    numbers = random.Random(seed)
    sizes += [BLOCK - numbers.randrange(40)] * 3
    texts = ["x" * size for size in sizes]
    run = read(framed(history_record({"text": text}) for text in texts))
    assert [row["text"] for row in run.rows] == texts and run.warning is None


def test_values_with_types_alone(read: Reader) -> None:
    """The form that wandb 0.31 writes beside JSON text and that later releases may write without it."""
    item = messages.HistoryItem
    items = [
        item(key="none", none=0),
        item(key="true", boolean=True),
        item(key="int", integer=2**53 + 1),
        item(key="whole", number=2.0),
        item(key="nan", number=math.nan),
        item(key="text", text="1"),
        item(nested_key=["a", "b"], json="[1, 2.5]"),
        item(key="json", value_json="7"),
    ]
    record = messages.Record(history=messages.HistoryRecord(item=items)).SerializeToString()
    (row,) = read(framed([record])).rows
    expected = {
        "none": None, "true": True, "int": 2**53 + 1, "whole": 2.0, "nan": math.nan, "text": "1",
        "a.b": [1, 2.5], "json": 7,
    }  # fmt: skip
    assert same(row, expected)


def test_config_as_it_was_changed_last(read: Reader) -> None:
    first, second = messages.ConfigRecord(), messages.ConfigRecord()
    first.update.add(key="a", value_json='{"x": 1, "y": 2}')
    first.update.add(key="b", value_json="1")
    first.update.add(nested_key=["_wandb", "t"], value_json="{}")
    second.update.add(key="a", value_json='{"x": 3}')
    second.update.add(nested_key=["c", "d"], value_json='"e"')
    second.remove.add(key="b")
    records = [messages.Record(config=config).SerializeToString() for config in (first, second)]
    assert read(framed([run_record("i", {"a": 0}), *records])).config == {"a.x": 3, "c.d": "e"}


def test_records_of_other_kinds_are_skipped(read: Reader) -> None:
    """Also those with fields that this protocol does not know, of every type on the wire."""
    summary = messages.SummaryRecord(update=[messages.SummaryItem(key="a", value_json="1")])
    other = messages.Record(num=300, uuid="u", summary=summary).SerializeToString()
    unknown = b"\xf9\x3f" + bytes(8) + b"\xfd\x3f" + bytes(4) + b"\xf8\x3f\x01"  # field 1023, thrice
    rows = [history_record({"a": 1}), other, unknown, unknown + history_record({"a": 2})]
    run = read(framed(rows))
    assert [row["a"] for row in run.rows] == [1, 2] and run.warning is None


def test_what_wandb_would_not_write_is_left_out_and_told(read: Reader) -> None:
    broken = messages.Record(
        history=messages.HistoryRecord(item=[messages.HistoryItem(key="a", value_json="{")])
    ).SerializeToString()
    data = framed([history_record({"a": 1}), broken, b"\x12\xff", b"\x07", history_record({"a": 2})])
    run = read(data)
    assert [row["a"] for row in run.rows] == [1, 2]
    assert run.warning == f"run-x.wandb: {len(broken) + 3} of {len(data)} bytes cannot be read"


# --- damage ----------------------------------------------------------------------------------------------


def _bytes_of(warning: str | None) -> int:
    """That cannot be read, as the warning tells."""
    return int(warning.split()[1].replace(",", "")) if warning and " of " in warning else 0


def test_a_file_cut_anywhere_yields_the_rows_before(read: Reader, written: Path) -> None:
    data, whole = written.read_bytes(), read_run(written)
    kept = 0
    for length in sorted(
        {*range(0, len(data), 4999), *range(12 * BLOCK - 20, 12 * BLOCK + 20), len(data) - 1}
    ):
        run = read(data[:length])
        assert same(run.rows, whole.rows[: len(run.rows)])
        assert len(run.rows) >= kept, "a longer file has no fewer rows"
        assert run.exit_code is None
        kept = len(run.rows)
        if run.id:
            assert (run.id, run.group, run.tags) == (whole.id, whole.group, whole.tags)
        assert _bytes_of(run.warning) < 5 * BLOCK  # of the longest record, of which a part is there
    assert kept >= len(whole.rows) - 1


@pytest.mark.parametrize("seed", range(20))
def test_corruption_loses_little_more_than_the_block_it_is_in(read: Reader, written: Path, seed: int) -> None:
    data, whole = bytearray(written.read_bytes()), read_run(written)
    numbers = random.Random(seed)
    start = numbers.randrange(8 * BLOCK, len(data) - 50)  # behind the records that fill several blocks
    data[start : start + 50] = numbers.randbytes(50)
    run = read(bytes(data))
    rows = iter(whole.rows)
    assert all(any(same(row, candidate) for candidate in rows) for row in run.rows), "in order, unchanged"
    assert 0 < _bytes_of(run.warning) < 2 * BLOCK
    smallest = min(len(json.dumps(row)) for row in whole.rows[6:])
    assert 0 <= len(whole.rows) - len(run.rows) <= 2 * BLOCK / smallest


def test_a_zeroed_end_is_damage(read: Reader, written: Path) -> None:
    """As a power cut may leave it."""
    data, whole = written.read_bytes(), read_run(written)
    half = len(data) // 2
    run = read(data[:half] + bytes(len(data) - half))
    assert 0 < len(run.rows) < len(whole.rows) and same(run.rows, whole.rows[: len(run.rows)])
    assert _bytes_of(run.warning) >= len(data) - half - BLOCK


@given(strategies.binary(max_size=300), strategies.integers(0, 2**32))
def test_nothing_after_the_header_raises(read: Reader, rest: bytes, seed: int) -> None:
    read(HEADER + rest)
    data = bytearray(framed([run_record("i", {"a": 1}), history_record({"a": 1}), exit_record(0)]))
    numbers = random.Random(seed)
    data[numbers.randrange(len(HEADER), len(data))] ^= 1 << numbers.randrange(8)
    run = read(bytes(data))
    assert run.warning is not None and run.rows in ([], [{"a": 1}])


@pytest.mark.parametrize("length", range(len(HEADER) + 1))
def test_a_file_that_was_only_begun(read: Reader, length: int) -> None:
    run = read(HEADER[:length])
    assert (run.id, run.rows, run.started, run.exit_code) == (None, [], None, None)
    assert run.warning == "run-x.wandb: holds no record"


@pytest.mark.parametrize("data", [b"{}\n", b":W&B\xe1\xbe\x01rest", b"PK\x03\x04" * 10])
def test_another_file_is_refused(read: Reader, data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"it is no \.wandb file, which begins with b':W&B"):
        read(data)


def test_the_messages_are_wandbs() -> None:
    """Each field that is declared here has the number and the type that wandb's own messages give it."""
    own = Record.DESCRIPTOR.file.message_types_by_name
    assert set(own) >= {"Record", "HistoryItem", "ConfigItem", "RunRecord", "RunExitRecord"}
    known = {**messages.DESCRIPTOR.message_types_by_name, "Timestamp": Timestamp.DESCRIPTOR}
    enumerated = FieldDescriptor.TYPE_ENUM, FieldDescriptor.TYPE_INT32  # the same on the wire
    for name, message in own.items():
        for field in message.fields:
            theirs = known[name].fields_by_name[field.name]
            assert (theirs.number, theirs.is_repeated) == (field.number, field.is_repeated), field.full_name
            assert theirs.type == field.type or (theirs.type, field.type) == enumerated, field.full_name
