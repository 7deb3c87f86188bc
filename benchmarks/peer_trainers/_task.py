"""What every trainer is given, and what it leaves behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A Llama, by the names of conf/model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    rope_theta: float
    norm_eps: float

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Task:
    shape: Shape
    sequence_length: int
    micro_batch: int  # sequences, of each rank
    batch: int  # sequences, of all ranks
    steps: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    tokens: str  # .npy, uint16 [steps × batch, sequence_length + 1], in the order of training
    weights: str  # .npz, float32, by the names of pipeline.model.llama
    overrides: tuple[str, ...]  # the same for our command line
    layout: str  # single | ddp | fsdp
    directory: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def of(path: str | Path) -> Task:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return Task(**{**fields, "shape": Shape(**fields["shape"])})

    @staticmethod
    def of_command_line() -> Task:
        return Task.of(sys.argv[1])

    def parameters(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.weights))

    def sequences(self) -> np.ndarray:
        return np.load(self.tokens, mmap_mode="r")

    def micro_batches(self, step: int, rank: int, ranks: int) -> Iterator[np.ndarray]:
        """Of step 0, 1, …: int64 [micro_batch, sequence_length + 1], each rank its own."""
        tokens = self.sequences()
        for first in range(step * self.batch, (step + 1) * self.batch, ranks * self.micro_batch):
            start = first + rank * self.micro_batch
            yield tokens[start : start + self.micro_batch].astype(np.int64)


def renamed(ours: str, names: dict[str, str], layer: str) -> str:
    """What a peer calls our parameter: blocks.3.ffn.up.weight -> {layer}.3.{names["ffn.up"]}.weight"""
    module = ours.removesuffix(".weight")
    if not module.startswith("blocks."):
        return f"{names[module]}.weight"
    _, number, part = module.split(".", 2)
    return f"{layer}.{number}.{names[part]}.weight"


class Record:
    """Rows like those of our record: `step` from 1, its mean loss per token as far as this rank knows it, and
    the time when it was done."""

    def __init__(self, task: Task) -> None:
        self._path = Path(task.directory) / f"metrics-{os.environ.get('RANK', '0')}.jsonl"

    def write(self, step: int, loss: float) -> None:
        row: dict[str, Any] = {"step": step, "train/loss": loss, "wall": time.time()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
