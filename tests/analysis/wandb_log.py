"""Offline files of wandb with made-up rows, in its format, written without its client."""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.wandb_files import BLOCK, FIRST, FULL, HEADER, LAST, MIDDLE
from pipeline.store import Row

messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")


def framed(records: Iterable[bytes]) -> bytes:
    """As the log's writer does it: as much of a record as fits in the block, then the rest."""
    data = bytearray(HEADER)
    for record in records:
        rest, first = record, True
        while first or rest:
            room = BLOCK - len(data) % BLOCK
            if room < 7:
                data += bytes(room)
                room = BLOCK
            body, rest = rest[: room - 7], rest[room - 7 :]
            kind = (LAST if not first else FULL) if not rest else FIRST if first else MIDDLE
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + body), len(body), kind) + body
            first = False
    return bytes(data)


def run_record(run_id: str, config: Mapping[str, Any], started: int = 1_760_000_000) -> bytes:
    run = messages.RunRecord(run_id=run_id, display_name=f"name of {run_id}", tags=["a", "b"])
    run.run_group, run.job_type = "g", "train"
    run.start_time.seconds = started
    run.start_time.nanos = 500_000_000
    for key, value in config.items():
        run.config.update.add(key=key, value_json=json.dumps(value))
    return _serialized(run=run)


def history_record(row: Row) -> bytes:
    items = [messages.HistoryItem(key=key, value_json=json.dumps(value)) for key, value in row.items()]
    return _serialized(history=messages.HistoryRecord(item=items))


def exit_record(code: int) -> bytes:
    return _serialized(exit=messages.RunExitRecord(exit_code=code))


def _serialized(**record: Any) -> bytes:
    data: bytes = messages.Record(num=7, **record).SerializeToString()
    return data


def write_attempt(run: Path, attempt: int, rows: Sequence[Row], every: int = 1) -> Path:
    """What the mirror of this attempt leaves in a run directory."""
    name = f"{run.name}-a{attempt}"
    file = run / "wandb" / f"offline-run-20260101_00000{attempt}-{name}" / f"run-{name}.wandb"
    file.parent.mkdir(parents=True)
    logged = [row for row in rows if row["step"] % every == 0 or row["step"] == 1 or "val/loss" in row]
    config = {"run": run.name, "attempt": attempt, "track.every": every}
    file.write_bytes(framed([run_record(name, config), *map(history_record, logged), exit_record(0)]))
    return file
