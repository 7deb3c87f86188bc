"""Reads run-*.wandb, the log that wandb's client keeps of a run on this machine, without wandb's service.

The file is a LevelDB log: 7 bytes that name the format, then blocks of 32 KiB counted from the beginning of
the file, in which each chunk is

    crc32(kind, body): u32 | length of the body: u16 | kind: u8 | body        (little-endian)

A record is one chunk, or several where it crosses the end of a block; fewer than 7 bytes at that end are
zeros. It is a message of wandb/proto/wandb_internal.proto, one of many kinds, of which four tell what a
comparison needs: the run, its config, the rows that were logged, and how it ended (analysis.wandb_messages).

Nothing here knows our own names. To read anybody's runs: `read_run(file)` for each run-*.wandb below their
wandb/ folders; choose and group them by `config["optim.lr"]`, `group` or `tags`; name the metrics that are
wanted, such as `metrics={"tokens", "eval/loss"}`, which is faster than all; pick the x-axis among them
(`_step`, `_runtime` and `_timestamp` are there whatever was logged). Several files of one run are merged by a
counter that the training itself logged, never by `_step`: see analysis.sources for ours.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from analysis.wandb_messages import Record
from pipeline.config import ConfigError
from pipeline.store import Row, decode

HEADER = b":W&B\xe1\xbe\x00"  # a name, a magic number, version 0
BLOCK = 32 * 1024
CHUNK = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
_CRC_OF_KIND = [zlib.crc32(bytes([kind])) for kind in range(5)]


@dataclass(frozen=True)
class WandbRun:
    """What one file says, as far as it can be read. Nested keys are joined by dots: {"a": {"b": 1}} is "a.b".

    A file that was only begun, or whose first block is lost, has no `id`.
    """

    id: str | None
    name: str
    group: str
    job_type: str
    tags: list[str]
    started: float | None  # Unix seconds
    config: dict[str, Any]
    rows: list[Row]  # as logged, in that order
    exit_code: int | None  # None: the run goes on, or ended without a word
    warning: str | None  # how much of the file is lost


def read_run(path: Path, metrics: Collection[str] | None = None) -> WandbRun:
    """The run in this file; of its rows only these metrics (None: all), without rows that have none of them.

    Raises ConfigError when it is no .wandb file, OSError when it cannot be opened. Of a damaged one it reads
    what is whole: at the next block it goes on.
    """
    data = path.read_bytes()
    if data[: len(HEADER)] != HEADER[: len(data)]:
        raise ConfigError(
            f"{path}: begins with {data[: len(HEADER)]!r}, so it is no .wandb file, which begins "
            f"with {HEADER!r}"
        )
    records, lost = _records(data)
    run: Any = Record().run
    config: dict[str, Any] = {}
    rows: list[Row] = []
    exit_code = None
    for record in records:
        try:
            message = Record.FromString(record)
            kind = message.WhichOneof("value")
            if kind == "history":
                if row := _row(message.history.item, metrics):
                    rows.append(row)
            elif kind == "exit":
                exit_code = message.exit.exit_code
            elif kind == "run":
                run = message.run
                _update(config, run.config)
            elif kind == "config":
                _update(config, message.config)
        except (DecodeError, ValueError):  # whole, but nothing that wandb writes
            lost += len(record)
    started = run.start_time
    return WandbRun(
        id=run.run_id or None,
        name=run.display_name,
        group=run.run_group,
        job_type=run.job_type,
        tags=list(run.tags),
        started=started.seconds + started.nanos * 1e-9 if run.HasField("start_time") else None,
        config={key: value for key, value in flattened(config).items() if key.split(".")[0] != "_wandb"},
        rows=rows,
        exit_code=exit_code,
        warning=_warning(path, len(data), lost, len(records)),
    )


def _warning(path: Path, size: int, lost: int, records: int) -> str | None:
    if lost:
        return f"{path.name}: {lost:,} of {size:,} bytes cannot be read"
    return None if records else f"{path.name}: holds no record"


# --- records ---------------------------------------------------------------------------------------------


def _records(data: bytes) -> tuple[list[bytes], int]:
    """The whole records, and how many bytes belong to none."""
    records: list[bytes] = []
    parts: list[bytes] = []  # of a record that goes on in the next block
    at = used = min(len(HEADER), len(data))
    while at < len(data):
        room = BLOCK - at % BLOCK
        if room < CHUNK.size:
            used += min(room, len(data) - at)
            at += room
            continue
        chunk = _chunk(data, at, room)
        if chunk is None:
            parts = []
            at += room
            continue
        kind, body = chunk
        at += CHUNK.size + len(body)
        if kind in (FULL, FIRST):
            parts = [body]
        elif parts:
            parts.append(body)
        if kind in (FULL, LAST) and parts:
            records.append(b"".join(parts))
            used += len(parts) * CHUNK.size + len(records[-1])
            parts = []
    return records, len(data) - used


def _chunk(data: bytes, at: int, room: int) -> tuple[int, bytes] | None:
    """Kind and body of the chunk that begins here, with so much room in its block; None: it is not whole."""
    if at + CHUNK.size > len(data):
        return None
    crc, length, kind = CHUNK.unpack_from(data, at)
    body = data[at + CHUNK.size : at + CHUNK.size + length]
    fits = FULL <= kind <= LAST and len(body) == length <= room - CHUNK.size
    return (kind, body) if fits and zlib.crc32(body, _CRC_OF_KIND[kind]) == crc else None


# --- what they say ---------------------------------------------------------------------------------------


def _row(items: Iterable[Any], metrics: Collection[str] | None) -> Row:
    found = {item.key or ".".join(item.nested_key): item for item in items}
    if metrics is not None:
        found = {key: item for key, item in found.items() if key in metrics}
    texts = [item.value_json for item in found.values()]
    if not all(texts):
        return decode({key: _value(item) for key, item in found.items()})
    # One call for the whole row: several times as fast as one for each value.
    text = ",".join(texts)
    row = dict(zip(found, json.loads(f"[{text}]"), strict=True))
    return decode(row) if '"' in text else row


def _value(item: Any) -> Any:
    """JSON text, or since wandb 0.31 a value with a type, in which JSON text is one of the types."""
    kind = None if item.value_json else item.WhichOneof("value")
    if kind in (None, "json"):
        return json.loads(item.value_json or item.json or "null")
    return None if kind == "none" else getattr(item, kind)


def _update(config: dict[str, Any], changes: Any) -> None:
    for item in changes.remove:
        config.pop(item.key or ".".join(item.nested_key), None)
    for item in changes.update:
        key = item.key or ".".join(item.nested_key)
        config.pop(key, None)  # what was set last comes last
        config[key] = json.loads(item.value_json)


def flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """{a: {b: 1}} as {a.b: 1}; an empty group stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flattened(value) if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": leaf for name, leaf in inner.items()} or {key: value}
    return flat
