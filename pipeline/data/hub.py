"""Files on the Hugging Face Hub, read as they come over the network.

    hf://datasets/allenai/c4@607bd4c8450a42878aa9ddc051a65a055450ef87/en/c4-train.{00000..00031}-of-01024.json.gz

A file is named by its commit, so its name alone says what it holds: nothing is asked of the network before
a corpus is prepared, and a run means the same text for ever. `{a..b}` stands for all numbers from a to b.
HF_ENDPOINT and HF_TOKEN are heeded, as by all tools of the Hub.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.config import ConfigError
from pipeline.data.extra import require

SCHEME = "hf://"
_PINNED = re.compile(
    r"hf://(?P<kind>datasets/|spaces/)?(?P<repo>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})/(?P<file>.+)"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK_BYTES = 2**23  # of one request
_CLIENTS = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "aiohttp"}  # whose errors are its


def is_remote(path: str) -> bool:
    """Whether a file of data.files lies on the Hub."""
    return path.startswith(SCHEME)


def expand(pattern: str, key: str = "data.files") -> list[str]:
    """The paths that a pattern stands for. Raises ConfigError unless it names a commit."""
    if not _PINNED.fullmatch(pattern):
        raise ConfigError(
            f"{key}={pattern}: a file of the Hub must name its commit, so that it cannot change: "
            f"hf://datasets/OWNER/NAME@COMMIT/FILE with the 40 hex digits of COMMIT"
        )
    if re.search(r"[*?\[]", pattern):
        raise ConfigError(
            f"{key}={pattern}: no globs on the Hub. Name a range: part-{{00000..00031}}.json.gz"
        )
    paths = list(_expanded(pattern))
    if not paths:
        raise ConfigError(f"{key}={pattern}: a range runs from the smaller number to the larger one")
    return paths


def _expanded(pattern: str) -> Iterator[str]:
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expanded(
            pattern[: found.start()] + str(number).zfill(len(first)) + pattern[found.end() :]
        )


def size(path: str) -> int:
    """In bytes."""
    with explained(path):
        return int(_file_system().info(path)["size"])


def open_stream(path: str) -> IO[bytes]:
    """The file, fetched block by block while it is read; a request that fails is tried again."""
    with explained(path):  # see also sources.documents, for what goes wrong later
        stream: IO[bytes] = _file_system().open(path, "rb", block_size=_BLOCK_BYTES)
        return stream


def download(path: str) -> Path:
    """A small file, kept in the Hub's own cache on disk."""
    found = _PINNED.fullmatch(path)
    assert found
    kind = (found["kind"] or "models/").removesuffix("s/")
    with explained(path):
        hub = require("huggingface_hub")
        return Path(
            hub.hf_hub_download(found["repo"], found["file"], repo_type=kind, revision=found["commit"])
        )


@functools.cache
def _file_system() -> Any:
    return require("huggingface_hub").HfFileSystem()


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what can go wrong on the way to a file of the Hub into a ConfigError."""
    try:
        yield
    except Exception as error:
        known = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if not isinstance(error, OSError) and not known & _CLIENTS:
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        # What the client finds neither on the Hub nor in its cache may only be out of reach.
        if isinstance(error, FileNotFoundError) and type(error).__name__ != "LocalEntryNotFoundError":
            raise ConfigError(f"{path}: not on the Hub ({said})") from error
        raise ConfigError(
            f"{path}: the Hub cannot be reached ({said}). Prepare the corpus where "
            f"there is a network: python -m pipeline.data with the same settings"
        ) from error
