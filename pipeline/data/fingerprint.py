"""Which tokens a corpus holds: part of the identity of a run, so cheap enough for a preview."""

from __future__ import annotations

import functools
import hashlib
import os
import platform

from pipeline import samples
from pipeline.config import TEXT_SOURCES, DataConfig
from pipeline.data import hub
from pipeline.data.sources import corpus_files
from pipeline.data.tokenizers import content_id

_FINGERPRINT_BYTES = 65536  # read at each end of a file


def fingerprint(data: DataConfig) -> str:
    """Which tokens the corpus holds, without reading all of it and wherever its files lie.

    "stdlib-3.11.7", or "text-" and 16 hex digits of SHA-256 over the size, the first and the last 64 KiB of
    each file in order (of a file on the Hub: its name, which holds its commit); then "+" and 8 hex digits of
    the tokenizer's file, unless tokens are bytes. Of labelled samples what their file in pipeline.samples
    says. Raises ConfigError when a file is missing.
    """
    if data.source not in TEXT_SOURCES:
        return samples.fingerprint(data)
    paths = [path for path, _ in corpus_files(data)]
    text = f"stdlib-{platform.python_version()}" if data.source == "stdlib" else of_files(paths)
    return text if data.tokenizer == "bytes" else f"{text}+{content_id(data.tokenizer)[:8]}"


def of_files(paths: list[str], kind: str = "text") -> str:
    """The kind, "-", and 16 hex digits over the size, the first and the last 64 KiB of each file in order."""
    return f"{kind}-{_digest(tuple((path, *_size_and_time(path)) for path in paths))}"


def _size_and_time(path: str) -> tuple[int, int]:
    if hub.is_remote(path):
        return 0, 0
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of (path, bytes, time of change in ns); the time only tells the cache that a file was written anew."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        if hub.is_remote(path):
            digest.update(path.encode())
            continue
        with open(path, "rb") as file:
            digest.update(size.to_bytes(8, "little"))
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
