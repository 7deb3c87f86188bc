"""Checkpoints: everything that decides how a run goes on.

    checkpoints/step-00000120/   torch.distributed.checkpoint: model and optimizer, by parameter name
                progress.json    where the run stands: clock, stream position, batch schedule

A checkpoint is written under a temporary name and renamed when complete, so one that carries its final
name is whole. The newest two are kept.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pipeline.batch._interface import Decision, State
from pipeline.config import ConfigError
from pipeline.parallel._ranks import Ranks
from pipeline.store import RunDirectory, write_atomically

KEEP = 2


@dataclass
class Progress:
    """Where a run stands between two optimizer steps."""

    schedule: State
    next_batch: Decision
    first_batch: int  # sequences; the batch that lr.batch_scaling is relative to
    step: int = 0
    sequences: int = 0
    time: float = 0.0  # seconds of training, summed over attempts

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Progress:
        tree = json.loads(text)
        return Progress(
            schedule=State(**tree.pop("schedule")), next_batch=Decision(**tree.pop("next_batch")), **tree
        )


def save(
    run: RunDirectory, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Writes one checkpoint; returns when it is complete. Called by all ranks."""
    final = run.checkpoints / f"step-{progress.step:08d}"
    partial = run.checkpoints / f"partial-{progress.step:08d}"
    if ranks.is_main:
        for torn in run.checkpoints.glob("partial-*"):
            shutil.rmtree(torn)
    _barrier(ranks)
    _quietly(dcp.save, _tensors(model, optimizer), checkpoint_id=partial)
    if ranks.is_main:
        write_atomically(partial / "progress.json", progress.to_json())
        partial.rename(final)
        for old in complete(run)[:-KEEP]:
            shutil.rmtree(old.rename(run.checkpoints / f"partial-{old.name}"))
    _barrier(ranks)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Loads a checkpoint into model and optimizer, whatever the number of ranks that wrote it."""
    tensors = _tensors(model, optimizer)
    _quietly(dcp.load, tensors, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    return Progress.from_json((path / "progress.json").read_text(encoding="utf-8"))


def complete(run: RunDirectory) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(run.checkpoints.glob("step-*"))


def load_weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The newest checkpoint's parameters, whole and by name, without a model or other ranks."""
    if not complete(run):
        raise ConfigError(f"{run.checkpoints}: holds no checkpoint, so there are no weights to read")
    path = complete(run)[-1]
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    _quietly(dcp.load, {"model": weights}, checkpoint_id=path)
    return weights


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _barrier(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.barrier()


def _quietly(function: Any, *arguments: Any, **options: Any) -> None:
    with warnings.catch_warnings():  # a single process without a process group is what we mean
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        function(*arguments, **options)
