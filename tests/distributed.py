"""Real ranks for tests: gloo processes with a timeout and the child's own traceback."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.parallel import strategy_class
from pipeline.parallel._ranks import Ranks
from pipeline.store import RunDirectory
from pipeline.train import train


def gloo_ranks(
    world_size: int, function: Callable[..., object], *arguments: object, timeout_s: float = 120
) -> list[Any]:
    """`function(rank, *arguments)` in `world_size` processes joined by gloo; their results by rank.

    A rank that raises fails the test with its own traceback; a rank that hangs is killed after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as directory:
        context = torch.multiprocessing.spawn(
            _rank, (world_size, directory, function, arguments), nprocs=world_size, join=False
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=0.2):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} did not end within {timeout_s:.0f} s")
        return [torch.load(f"{directory}/result-{rank}", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, directory: str, function: Callable[..., object], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *arguments), f"{directory}/result-{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_ranks(config: Config, function: Callable[..., object], *arguments: object) -> list[Any]:
    """`function(rank, *arguments)` on each rank of the config's mesh."""
    if not strategy_class(config.parallel.strategy).axes:
        return [function(0, *arguments)]
    return gloo_ranks(config.parallel.world_size, function, *arguments)


def ranks_of(config: Config, rank: int = 0) -> Ranks:
    parallel = config.parallel
    return Ranks(rank, parallel.world_size, rank // parallel.tensor, parallel.data_ranks, torch.device("cpu"))


def train_rank(rank: int, config: Config, path: str, attempt: int = 1) -> None:
    """One rank of a run, in a process group that exists already."""
    train(config, RunDirectory(path), attempt, ranks_of(config, rank))


def train_here(config: Config, attempt: int = 1) -> RunDirectory:
    """Trains `config` without a supervisor, in this process or (several ranks) in gloo processes."""
    run = RunDirectory.of(config)
    run.freeze(config)
    if not strategy_class(config.parallel.strategy).axes:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            train_rank(0, config, str(run.path), attempt)
        finally:
            torch.set_num_threads(threads)
    else:
        gloo_ranks(config.parallel.world_size, train_rank, config, str(run.path), attempt)
    return run


def column(run: RunDirectory, name: str) -> list[Any]:
    return [row[name] for row in run.rows() if name in row]
