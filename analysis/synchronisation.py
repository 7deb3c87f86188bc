"""How long data-parallel ranks take to agree, by what pipeline.parallel sends.

Collectives by recursive halving and doubling, with the costs of Thakur, Rabenseifner and Gropp 2005
(Optimization of collective communication operations in MPICH, section 4). Nothing is overlapped with
computation, so that these times are upper bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import Config, ConfigError, LlamaConfig, ParallelConfig

GRADIENT_BYTES = 4  # of an element: gradients are summed over ranks in float32, whatever the precision
GATHERED_BYTES = {"float32": 4, "bfloat16": 2}  # of an element of the parameters that FSDP gathers
BUCKET_BYTES = 25 * 2**20  # in which DDP sends gradients, the first of them with 1 MiB
FIRST_BUCKET_BYTES = 2**20
LEAST_GB_PER_S = 1e-6  # a modem's; times beyond these two limits are too long for a figure
MOST_LATENCY_US = 1e9


@dataclass(frozen=True)
class Network:
    """What a rank sends in a second, and how long a message of no length takes."""

    bandwidth_gb_per_s: float = 50.0  # 400 Gb/s, one InfiniBand NDR adapter for each GPU
    latency_us: float = 10.0

    def __post_init__(self) -> None:
        if not LEAST_GB_PER_S <= self.bandwidth_gb_per_s < math.inf:
            raise ConfigError(
                f"bandwidth {self.bandwidth_gb_per_s:g} GB/s: must be finite and at least {LEAST_GB_PER_S:g}"
            )
        if not 0 <= self.latency_us <= MOST_LATENCY_US:
            raise ConfigError(f"latency {self.latency_us:g} µs: must be from 0 to {MOST_LATENCY_US:g}")

    def gather_s(self, ranks: int, size_bytes: float, messages: int = 1) -> float:
        """An all-gather, or a reduce-scatter, of so many bytes in all, in so many collectives."""
        latency_s, bytes_per_s = self.latency_us * 1e-6, self.bandwidth_gb_per_s * 1e9
        rounds = math.ceil(math.log2(ranks))
        return messages * rounds * latency_s + (ranks - 1) / ranks * size_bytes / bytes_per_s

    def all_reduce_s(self, ranks: int, size_bytes: float, messages: int = 1) -> float:
        """A reduce-scatter and an all-gather."""
        return 2 * self.gather_s(ranks, size_bytes, messages)


@dataclass(frozen=True)
class Synchronisation:
    """Seconds, without overlap."""

    per_micro_s: float
    per_step_s: float

    def times(self, factor: float) -> Synchronisation:
        return Synchronisation(factor * self.per_micro_s, factor * self.per_step_s)


def synchronisation(config: Config, replicate: int, shard: int, network: Network) -> Synchronisation:
    """Of the run `config` with its data-parallel ranks in this mesh: what pipeline.parallel sends."""
    model, parallel = config.model, config.parallel
    assert isinstance(model, LlamaConfig)  # analysis.projection has no others
    own = model.parameters / parallel.tensor  # what the data-parallel ranks share, on each of tensor ranks
    scalars_s = network.all_reduce_s(replicate * shard, 0)  # loss, norm and statistics, in one vector
    if shard == 1:
        size = own * GRADIENT_BYTES
        buckets = 1 + math.ceil(max(0.0, size - FIRST_BUCKET_BYTES) / BUCKET_BYTES)
        return Synchronisation(0.0, scalars_s + network.all_reduce_s(replicate, size, buckets))
    # FSDP2 groups: each block, embedding and head (with tied weights: in the root), the root.
    layers = model.layers + (1 if model.tied else 3)
    matrix = model.vocab * model.width / parallel.tensor
    # Kept from the forward to the backward pass: the root with the last norm, and the head.
    kept, kept_layers = matrix + model.width, 1 if model.tied else 2
    again = parallel.reshard_after_forward
    gathered = own + (own - kept if again else 0)
    gathers = layers + (layers - kept_layers if again else 0)
    per_micro_s = network.gather_s(shard, gathered * GATHERED_BYTES[parallel.precision], gathers)
    scatter_s = network.gather_s(shard, own * GRADIENT_BYTES, layers)
    replicas_s = network.all_reduce_s(replicate, own / shard * GRADIENT_BYTES, layers)
    if parallel.shard_gradients:
        return Synchronisation(per_micro_s + scatter_s, scalars_s + replicas_s)
    return Synchronisation(per_micro_s, scalars_s + replicas_s + scatter_s)


def mesh_at(parallel: ParallelConfig, width: int) -> tuple[int, int]:
    """(replicate, shard) of so many data-parallel ranks: shards grow in number where there is one replica of
    them, else the replicas do. Too few ranks for one replica as it was share its parameters among them."""
    if parallel.shard == 1:
        return width, 1
    if parallel.replicate == 1 or width % parallel.shard:
        return 1, width
    return width // parallel.shard, parallel.shard
