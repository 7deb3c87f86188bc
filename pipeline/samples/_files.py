"""Files of data sets that the user has: found, or missing with a word where to get them; opened whatever
packs them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.config import ConfigError

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def found(paths: list[Path], source: str, published: str) -> list[str]:
    """The paths, if all are files. Raises ConfigError that says where the data set is published."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"data={source}: no file {', '.join(missing)}. The data set: {published}")
    return [str(path) for path in paths]


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The content, unpacked by the end of its name. Raises ConfigError for what is no such archive, or half
    of one."""
    try:
        with _OPENERS.get(Path(path).suffix, open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def one_directory(files: list[str], source: str, published: str) -> list[str]:
    """The problem, if `data.files` is not one directory's name."""
    if len(files) == 1:
        return []
    return [
        f"data.files={files}: data={source} needs one, the directory of its files. The data set: {published}"
    ]
