"""Documents from the standard library or from text files, here or on the Hub, one at a time.

A corpus is a list of pieces: whole files, byte ranges of a .jsonl, row groups of a .parquet. A piece can be
read by any process without reading what comes before it, so pieces are the unit of parallel work; their order
is the order of the documents. A reader holds one document (one line, one batch of rows), never a whole
file of many.

Every document is valid UTF-8 and not empty. What is left out comes as a `Skip` in its place, so that
it can be counted.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.config import ConfigError, DataConfig, did_you_mean
from pipeline.data import hub
from pipeline.data.extra import require

Format = Literal[".py", ".txt", ".jsonl", ".jsonl.gz", ".parquet"]
TEXT_FORMATS: dict[str, Format] = {  # by the ending of a file's name
    ".txt": ".txt",
    ".jsonl": ".jsonl",
    ".jsonl.gz": ".jsonl.gz",
    ".json.gz": ".jsonl.gz",  # as C4 calls it
    ".parquet": ".parquet",
}

_PARQUET_BATCH_ROWS = 256

# Left out of the standard library: the test suite, what distributions ship apart from it or not at all, and
# what differs from build to build. So the same Python version has the same text on (nearly) every machine.
_STDLIB_EXCLUDED_DIRECTORIES = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
}
_STDLIB_EXCLUDED_NAMES = ("turtle.py", "sitecustomize.py", "_sysconfigdata", "config-")


@dataclass(frozen=True)
class Piece:
    """What one process reads on its own: a file, or the half-open range [start, stop) of it.

    The range counts bytes in a .jsonl (the lines that begin in it) and row groups in a .parquet.
    """

    path: str
    format: Format
    start: int
    stop: int
    size_bytes: int


@dataclass(frozen=True)
class Skip:
    """A document that was left out: `reason` is counted, `detail` says more about this one."""

    reason: str
    detail: str = ""


# --- which files -----------------------------------------------------------------------------------------


def corpus_files(data: DataConfig) -> list[tuple[str, Format]]:
    """The files of the corpus in the order of their documents. Raises ConfigError when there are none."""
    if data.source == "stdlib":
        return [(path, ".py") for path in _stdlib_files()]
    if not data.files:
        raise ConfigError("data.files=[]: data=text needs at least one file or glob")
    paths = dict.fromkeys(path for pattern in data.files for path in _matches(pattern))  # without repeats
    return [(path, _format(path)) for path in paths]


def _stdlib_files() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in _STDLIB_EXCLUDED_DIRECTORIES and not name.startswith(_STDLIB_EXCLUDED_NAMES)
        ]
        paths += [
            Path(directory, name)
            for name in names
            if name.endswith(".py") and not name.startswith(_STDLIB_EXCLUDED_NAMES)
        ]
    if not paths:
        raise ConfigError(
            f"data=stdlib: this Python has no source files in {root}. Use data=text data.files=[…] instead"
        )
    return [str(path) for path in sorted(paths, key=lambda path: path.relative_to(root).parts)]


def _matches(pattern: str) -> list[str]:
    if hub.is_remote(pattern):
        return hub.expand(pattern)
    pattern = os.path.expanduser(pattern)
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        what = "this glob matches no file" if glob.has_magic(pattern) else "no such file"
        raise ConfigError(f"data.files={pattern}: {what} (current directory: {os.getcwd()})")
    return [os.path.abspath(path) for path in paths]


def _format(path: str) -> Format:
    if os.path.isdir(path):
        raise ConfigError(f"data.files={path}: is a directory. Name its files, such as {path}/*.jsonl")
    for ending, format in TEXT_FORMATS.items():
        if path.endswith(ending):
            return format
    raise ConfigError(f"data.files={path}: unknown ending. Allowed: {', '.join(TEXT_FORMATS)}")


# --- pieces ----------------------------------------------------------------------------------------------


def pieces(data: DataConfig, piece_bytes: int) -> list[Piece]:
    """The corpus cut into pieces of about `piece_bytes` where its format can be cut."""
    return [
        piece
        for path, format in corpus_files(data)
        for piece in _pieces_of_file(path, format, data.field, piece_bytes)
    ]


def _pieces_of_file(path: str, format: Format, field: str, piece_bytes: int) -> list[Piece]:
    size = hub.size(path) if hub.is_remote(path) else os.path.getsize(path)
    if format == ".parquet":
        return _pieces_of_parquet(path, field)
    if format == ".jsonl" and size:
        starts = [*range(0, size, piece_bytes), size]
        return [Piece(path, format, a, b, b - a) for a, b in itertools.pairwise(starts)]
    return [Piece(path, format, 0, size, size)]


def _pieces_of_parquet(path: str, field: str) -> list[Piece]:
    """One piece per row group, after a look at the schema. Raises ConfigError when it has no such text."""
    with _open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if field not in schema.names:
            raise ConfigError(
                f"data.field={field}: no such column of {path}, which has {', '.join(schema.names)}."
                f"{did_you_mean(field, schema.names)}"
            )
        if not _is_text(kind := schema.field(field).type):
            raise ConfigError(f"data.field={field}: this column of {path} is of type {kind}, not text")
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [Piece(path, ".parquet", i, i + 1, size) for i, size in enumerate(sizes)] or [
        Piece(path, ".parquet", 0, 0, 0)
    ]


def _is_text(kind: Any) -> bool:
    """Whether a pyarrow type holds text, or bytes that may be text."""
    types = require("pyarrow").types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    names = ("string", "large_string", "binary", "large_binary")
    return any(getattr(types, f"is_{name}")(kind) for name in names)


# --- documents -------------------------------------------------------------------------------------------


def documents(piece: Piece, field: str) -> Iterator[bytes | Skip]:
    """The records of a piece in order: the UTF-8 text of a document, or why there is none.

    One result per record (line, row or file), so counting them gives the place of each.
    Raises ConfigError for a file that cannot be decompressed or decoded at all.
    """
    with hub.explained(piece.path) if hub.is_remote(piece.path) else contextlib.nullcontext():
        records = _READERS[piece.format](piece, field)
        first = next(records, None)
        if first is not None:
            yield _checked(first)
            yield from map(_checked, records)
        elif piece.start == 0:
            yield Skip("empty", "a file without records")


def _checked(record: bytes | Skip) -> bytes | Skip:
    if isinstance(record, Skip):
        return record
    if not record:
        return Skip("empty")
    try:
        record.decode()
    except UnicodeDecodeError as error:
        return Skip("invalid UTF-8", f"byte {error.start}")
    return record


def _read_whole(piece: Piece, field: str) -> Iterator[bytes | Skip]:
    with _open(piece.path) as file:
        yield file.read()


def _read_jsonl(piece: Piece, field: str) -> Iterator[bytes | Skip]:
    with _open(piece.path) as file:
        position = 0
        if piece.start:
            file.seek(piece.start - 1)
            # the line that began in an earlier piece, or the newline before this one
            position = piece.start - 1 + len(file.readline())
        while position < piece.stop and (line := file.readline()):
            yield _field_of_line(line, field)
            position += len(line)


def _read_jsonl_gz(piece: Piece, field: str) -> Iterator[bytes | Skip]:
    try:
        with _open(piece.path) as compressed, gzip.open(compressed, "rb") as file:
            for line in file:
                yield _field_of_line(line, field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"data.files={piece.path}: cannot be decompressed: {error}") from error


def _field_of_line(line: bytes, field: str) -> bytes | Skip:
    if not line.strip():
        return b""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Skip("invalid UTF-8", f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Skip("malformed JSON", str(error))
    if not isinstance(record, dict):
        return Skip("not a JSON object", f"a {type(record).__name__}")
    if field not in record:
        return Skip("missing field", f"no {field!r} among {', '.join(map(repr, record))}")
    if not isinstance(record[field], str):
        return Skip("field is not text", f"{field!r} is a {type(record[field]).__name__}")
    try:
        return str(record[field]).encode()
    except UnicodeEncodeError:
        return Skip("invalid UTF-8", "an unpaired surrogate escape")


def _read_parquet(piece: Piece, field: str) -> Iterator[bytes | Skip]:
    with _open_parquet(piece.path) as file:
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=[field]):
            for value in batch.column(0).to_pylist():
                if value is None:
                    yield Skip("missing field", f"{field!r} is null")
                else:
                    yield value.encode() if isinstance(value, str) else value


def _open_parquet(path: str) -> Any:
    parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
    try:
        return parquet.ParquetFile(hub.open_stream(path) if hub.is_remote(path) else path)
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"data.files={path}: cannot be read as Parquet: {error}") from error


_READERS = {
    ".py": _read_whole,
    ".txt": _read_whole,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".parquet": _read_parquet,
}


def _open(path: str) -> IO[bytes]:
    return hub.open_stream(path) if hub.is_remote(path) else open(path, "rb")
