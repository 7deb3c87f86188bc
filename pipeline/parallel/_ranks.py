"""This process among the ranks of a run, and the few things they say to each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pipeline import rendezvous
from pipeline.config import Config, ConfigError
from pipeline.parallel import strategy_class

# A rank that waits this long for another gives up: a stopped rank must not hold the machine for ever.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the run."""

    rank: int
    world_size: int
    data_rank: int  # which share of each batch this rank reads
    data_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def tensor_ranks(self) -> int:
        """Ranks that share each matrix product and read the same sequences."""
        return self.world_size // self.data_ranks

    def loss_scale(self, sequences: int, of: int) -> float:
        """What the mean loss of this many of a step's sequences is multiplied with, so that the average over
        data-parallel ranks of the sums over micro-batches is the mean over the step."""
        return sequences * self.data_ranks / of

    def sum(self, vector: torch.Tensor) -> list[float]:
        """The float64 vector summed over all ranks, as numbers: a step's wait for the device."""
        if self.world_size > 1:
            dist.all_reduce(vector)
        return vector.tolist()

    def from_main(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]


def device_of(config: Config, local_rank: int) -> torch.device:
    """By launch.device and the rank on its machine. Raises ConfigError where there are too few GPUs."""
    wanted = config.launch.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"launch.device={config.launch.device}: rank {local_rank} of this machine finds "
            f"{torch.cuda.device_count()} GPUs. Use launch.device=cpu or fewer ranks"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[Ranks]:
    """The ranks of this run, from the environment (pipeline.rendezvous) that their supervisor sets."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != config.parallel.world_size:
        raise ConfigError(
            f"{world_size} processes for parallel={config.parallel.strategy} with "
            f"{config.parallel.world_size} ranks: start as many processes as ranks"
        )
    device = device_of(config, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(rank, world_size, rank // config.parallel.tensor, config.parallel.data_ranks, device)
    if not strategy_class(config.parallel.strategy).axes:
        yield ranks
        return
    # gloo beside nccl: checkpoints and decisions travel on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=rendezvous.store(COLLECTIVE_TIMEOUT),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    yield ranks
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
