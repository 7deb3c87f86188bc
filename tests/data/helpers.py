"""Small corpora, and settings that read them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings as hypothesis_settings

from pipeline.config import DataConfig

END = 256  # of a document, in byte tokens

at_any_speed = hypothesis_settings(deadline=None)  # property tests may share the machine with others


def settings(*files: Path | str, **changes: Any) -> DataConfig:
    """Byte tokens of text files (none: the standard library), short sequences, one process."""
    values: dict[str, Any] = {
        "source": "text" if files else "stdlib",
        "files": [str(file) for file in files],
        "field": "text",
        "tokenizer": "bytes",
        "samples": 1,
        "features": None,
        "standardise": False,
        "sequence_length": 8,
        "micro_batch": 2,
        "distribution": "shared",
        "validation_fraction": 0.2,
        "seed": 0,
        "workers": 1,
        "fingerprint": None,
    }
    return DataConfig(**{**values, **changes})


def texts(count: int, start: int = 0) -> list[str]:
    """Different documents of different lengths, some with characters of several bytes."""
    return [
        f"document {i}: " + "Größe 日本 word " * (i % 7) + str(i * i) for i in range(start, start + count)
    ]


def write_jsonl(path: Path, documents: Iterable[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def split_documents(tokens: np.ndarray, end: int = END) -> list[bytes]:
    """The documents in byte tokens, found by their end tokens alone."""
    assert tokens.size == 0 or tokens[-1] == end
    pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    return [bytes(piece[:-1].astype(np.uint8)) for piece in pieces if piece.size]


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
