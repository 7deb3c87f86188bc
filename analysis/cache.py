"""Tables that take long to read or to fetch, kept as Parquet in CRESCENDO_HOME/cache.

Each is kept with a key that says what it was made from. Under another key it counts as absent, as does a file
that cannot be read. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.store import home

Key = Sequence[str | int | float | None]


def place(*folders: str, name: str) -> Path:
    """The file of this table."""
    return home().joinpath("cache", *folders, f"{name}.parquet")  # a name may hold dots


def load(path: Path, key: Key) -> tuple[pl.DataFrame, list[str]] | None:
    """The table of this key and the notes that were kept with it."""
    try:
        file = io.BytesIO(path.read_bytes())  # at once: it may be replaced meanwhile
        kept = pl.read_parquet_metadata(file)
        if kept.get("key") != json.dumps(list(key)):
            return None
        file.seek(0)
        return pl.read_parquet(file), json.loads(kept["notes"])
    except (OSError, pl.exceptions.PolarsError, ValueError, KeyError):
        return None


def save(path: Path, key: Key, table: pl.DataFrame, notes: Sequence[str]) -> None:
    """Replaces the file whole. What a full or read-only disk refuses is fetched again the next time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    kept = {"key": json.dumps(list(key)), "notes": json.dumps(list(notes))}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            table.write_parquet(temporary, compression="lz4", metadata=kept)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
