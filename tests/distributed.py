"""Real ranks for tests: processes joined by gloo (nccl where each has a GPU), with a timeout and the child's
own traceback."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.parallel import strategy_class
from pipeline.parallel._ranks import Ranks
from pipeline.store import RunDirectory
from pipeline.train import train

# By the process that ranks are forked from: 8 new interpreters would take a minute to import it. The last four
# are what a run imports only when it comes to them, here in the first step.
PRELOADED = [
    *("pipeline.train", "tests.distributed", "tests.support"),
    *("torch._dynamo", "torch.distributed.checkpoint.state_dict"),
    *("torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
]


def gloo_ranks(
    world_size: int, function: Callable[..., object], *arguments: object, timeout_s: float = 120
) -> list[Any]:
    """`function(rank, *arguments)` in `world_size` processes joined by gloo; their results by rank.

    A rank that raises fails the test with its own traceback; a rank that hangs is killed after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = torch.multiprocessing.start_processes(
            _rank,
            (world_size, directory, function, arguments, dict(os.environ)),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=0.2):
                if time.monotonic() > deadline:
                    for process in context.processes:
                        process.kill()
                    raise TimeoutError(f"{function.__name__} did not end within {timeout_s:.0f} s")
        finally:
            for output in sorted(Path(directory).glob("output-*")):
                print(output.read_text(), end="")
        files = [f"{directory}/result-{rank}" for rank in range(world_size)]
        return [torch.load(file, weights_only=False, map_location="cpu") for file in files]


def _rank(
    rank: int,
    world_size: int,
    directory: str,
    function: Callable[..., object],
    arguments: Any,
    environment: dict[str, str],
) -> None:
    # The output of the process that ranks are forked from is not that of the test.
    output = os.open(f"{directory}/output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()  # that of the test, not of its first predecessor
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = f"file://{directory}/store"
    device = device_of(rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
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
    device = device_of(rank, parallel.world_size)
    return Ranks(rank, parallel.world_size, rank // parallel.tensor, parallel.data_ranks, device)


def device_of(rank: int, world_size: int) -> torch.device:
    """For several ranks a GPU each, where there are as many, and nccl between them; else the CPU and gloo."""
    enough = 1 < world_size <= torch.cuda.device_count()
    return torch.device("cuda", rank) if enough else torch.device("cpu")


def train_rank(rank: int, config: Config, path: str, attempt: int = 1) -> None:
    """One rank of a run, in a process group that exists already."""
    train(config, RunDirectory(path), attempt, ranks_of(config, rank))


def train_here(config: Config, attempt: int = 1) -> RunDirectory:
    """Trains `config` without a supervisor, in this process or (several ranks) in gloo processes."""
    run = RunDirectory.of(config)
    run.freeze(config)
    if not strategy_class(config.parallel.strategy).axes:
        train_rank(0, config, str(run.path), attempt)
    else:
        gloo_ranks(config.parallel.world_size, train_rank, config, str(run.path), attempt)
    return run


def column(run: RunDirectory, name: str) -> list[Any]:
    return [row[name] for row in run.rows() if name in row]
