"""Softmax regression in numpy, float64, on the samples that a run reads: the truth for optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.checkpoint import load_weights
from pipeline.config import Config
from pipeline.problem import problem_of
from pipeline.store import RunDirectory
from tests.distributed import column, ranks_of

Matrix = NDArray[np.float64]

DIGITS = [
    "data=digits", "model=logistic", "data.micro_batch=16", "batch.size=64", "budget.tokens=384",
    "lr.warmup_tokens=128", "eval.sequences=64",
]  # fmt: skip


class Softmax:
    """Weights [10, 64] and biases [10] as one matrix [10, 65]."""

    def __init__(self, config: Config) -> None:
        self._stream = problem_of(config, ranks_of(config)).train
        self.clip = config.optim.clip

    def _read(self, first: int, count: int) -> tuple[Matrix, Matrix]:
        inputs, labels = self._stream.read(first, count)
        flat = inputs.reshape(count, -1).astype(np.float64)
        return np.c_[flat, np.ones(count)], np.eye(10)[labels]

    def loss(self, weights: Matrix, first: int, count: int) -> float:
        x, y = self._read(first, count)
        logits = x @ weights.T
        top = logits.max(1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
        return float((log_sum - (logits * y).sum(1)).mean())

    def gradient(self, weights: Matrix, first: int, count: int) -> Matrix:
        """Of the mean loss."""
        x, y = self._read(first, count)
        shares = np.exp(x @ weights.T)
        return (shares / shares.sum(1, keepdims=True) - y).T @ x / count

    def clipped(self, weights: Matrix, first: int, count: int) -> Matrix:
        g = self.gradient(weights, first, count)
        norm = np.linalg.norm(g)
        return g * self.clip / norm if self.clip is not None and norm > self.clip else g


def steps(run: RunDirectory) -> list[tuple[int, int, float]]:
    """(first sample, samples, learning rate) of each."""
    sizes, rates = column(run, "batch/size"), column(run, "lr")
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    return list(zip(firsts, sizes, rates, strict=True))


def weights_of(run: RunDirectory) -> Matrix:
    """Those of the last checkpoint."""
    return as_matrix(load_weights(run))


def as_matrix(weights: dict[str, torch.Tensor]) -> Matrix:
    return np.c_[weights["linear.weight"].numpy(), weights["linear.bias"].numpy()].astype(np.float64)


def checkpoint(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def tensors(path: Path) -> dict[str, Any]:
    """Everything that a checkpoint holds, by name."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "properties")
    }
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found
