"""A corpus on disk: tokenised once, then memory-mapped by every run that reads it.

    corpora/<key>/train.bin  validation.bin   tokens, 2 or 4 bytes each, documents one after another
                  report.json                 what was read, held out and skipped
    corpora/<key>.lock                        held by the process that builds it
    corpora/.<key>.partial/                   being built; the next builder goes on from its journal

The key is a hash of everything that decides the tokens, so a directory never changes once it was renamed
into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError, DataConfig
from pipeline.data.fingerprint import fingerprint
from pipeline.data.parts import SPLITS
from pipeline.data.sources import corpus_files
from pipeline.data.stream import too_short
from pipeline.data.tokenizers import content_id

FORMAT_VERSION = 1  # raise it when the same text and settings begin to give other files


Report = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Tokens of the documents to train on and of those held out, each document with its end token.

    Both are 1-D views of memory-mapped files, uint16 or uint32, in the order of the source.
    """

    train: NDArray[Any]
    validation: NDArray[Any]
    fingerprint: str
    vocab_size: int
    report: dict[str, Any]


def prepare(data: DataConfig, corpora: Path, report: Report | None = None, progress: bool = False) -> Corpus:
    """The corpus of these settings from `corpora`, built there first if need be.

    Any number of processes may ask at once: one builds, the others wait and say so through `report`.
    Raises ConfigError when there is no such text, when it changed since the run was frozen, or when a split
    is shorter than one sequence.
    """
    say = report or (lambda message: None)
    found = fingerprint(data)
    if data.fingerprint not in (None, found):
        raise ConfigError(
            f"data.fingerprint={data.fingerprint}: the corpus changed since the run was frozen, it is now "
            f"{found}. Restore the text ({_remedy(data)}), or start a new run"
        )
    tokenizer = content_id(data.tokenizer)
    directory = Path(corpora) / _key(data, found, tokenizer)
    corpus = _open(directory)
    if corpus is None:
        with _lock(directory, say):
            corpus = _open(directory)  # somebody else may have built it meanwhile
            if corpus is None:
                from pipeline.data.building import build  # seldom needed, and long to import

                build(data, found, tokenizer, directory, say, progress)
                corpus = _open(directory)
    assert corpus is not None
    _check_lengths(corpus, data)
    return corpus


def _remedy(data: DataConfig) -> str:
    if data.source == "stdlib":
        return "run with that Python"
    return f"data.files=[{', '.join(data.files)}]"


def _key(data: DataConfig, found: str, tokenizer: str) -> str:
    """16 hex digits over everything that decides the tokens."""
    formats = None if data.source == "stdlib" else [format for _, format in corpus_files(data)]
    decides = [FORMAT_VERSION, found, formats, tokenizer, data.field, data.validation_fraction]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _check_lengths(corpus: Corpus, data: DataConfig) -> None:
    documents, validation = corpus.report["documents"], corpus.report["validation_documents"]
    problems = [
        *too_short(
            f"the {documents - validation} of {documents} documents to train on have",
            corpus.train,
            data.sequence_length,
            f"more text, a data.validation_fraction below {data.validation_fraction}",
        ),
        *too_short(
            f"the {validation} of {documents} documents held out for validation have",
            corpus.validation,
            data.sequence_length,
            f"more documents, a data.validation_fraction above {data.validation_fraction}",
        ),
    ]
    if problems:
        raise ConfigError(*problems)


# --- on disk ---------------------------------------------------------------------------------------------


def _open(directory: Path) -> Corpus | None:
    """The finished corpus there, or None."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        if np.dtype(report["dtype"]).kind != "u":  # such as Python objects, whose addresses would be read
            return None
        splits = {split: _map(directory / f"{split}.bin", report["dtype"]) for split in SPLITS}
        if any(splits[split].size != report[f"{split}_tokens"] for split in SPLITS):
            return None  # a copy or a disk that lost its end
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none there, or damaged
        return None
    return Corpus(**splits, fingerprint=report["fingerprint"], vocab_size=report["vocab_size"], report=report)


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size < np.dtype(dtype).itemsize:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@contextlib.contextmanager
def _lock(directory: Path, say: Report) -> Iterator[None]:
    """Held while the block runs. The kernel drops it when the holder dies, however it dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f"{directory.name}.lock"), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            say(f"corpus {directory.name}: waiting for {holder} to prepare it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
