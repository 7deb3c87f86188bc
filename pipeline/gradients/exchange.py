"""Reductions that let every rank see a slice of every rank's gradient on the way.

A ring all-reduce first gives each rank the sum of one slice (reduce-scatter), then the whole (all-gather). An
all-to-all followed by a local sum does the first half with the same bytes, and in between each rank holds
rows [J, columns]: the same coordinates of all J ranks' gradients. From rows follow norms, inner products and
variances of coordinates, exactly, with one all-reduce of a few numbers at the end of the step.

Memory: the rows of one layer (FSDP2) or bucket (DDP), J slices of it. Both hooks are public; what this file
knows beyond the documentation is the layout of FSDP2's flat gradient, `Layer.columns`. (DDP checks the
annotations of its hook, so they must not be strings: no `from __future__ import annotations` here.)
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.gradients.dtensor import is_fully_sharded, local, mesh_axis

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# torch 2.13 renamed both and warns of the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def exchange(flat: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Rows [ranks, n / ranks] of `flat` [n] as each rank of `group` has it; row r is rank r's."""
    rows = torch.empty_like(flat)
    dist.all_to_all_single(rows, flat, group=group)
    return rows.view(group.size(), -1)


def padded(flat: torch.Tensor, divisor: int) -> torch.Tensor:
    """With zeros at the end of the last dimension, to a multiple of `divisor`."""
    return nn.functional.pad(flat, (0, -flat.shape[-1] % divisor))


# --- DDP


class BucketExchange:
    """DDP's communication hook: averages as DDP would, and while active shows `see` each bucket's rows."""

    def __init__(self, model: DistributedDataParallel, see: Callable[[torch.Tensor], None]) -> None:
        self._see = see
        self.active = False
        model.register_comm_hook(dist.group.WORLD, self._reduce)

    def _reduce(
        self,
        group: dist.ProcessGroup,
        bucket: dist.GradBucket,
    ) -> torch.futures.Future[torch.Tensor]:
        if not self.active:
            return allreduce_hook(group, bucket)
        flat = bucket.buffer()
        rows = exchange(padded(flat, group.size()), group)
        self._see(rows)
        mean = torch.empty(rows.numel(), dtype=flat.dtype, device=flat.device)
        all_gather(mean, rows.mean(0), group)
        flat.copy_(mean[: flat.numel()])
        devices: list[int | str | torch.device] | None = [flat.device] if flat.is_cuda else None
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        future.set_result(flat)
        return future


# --- replicas


class ReplicaExchange:
    """For replicas, whose gradients nothing averages: shows `see` the rows of all of it at once."""

    def __init__(self, parameters: Iterable[torch.Tensor], see: Callable[[torch.Tensor], None]) -> None:
        self._parameters, self._see = list(parameters), see
        self.active = False

    def show(self) -> None:
        """The gradients in `.grad`. All ranks call it."""
        flat = torch.cat([p.grad.view(-1) for p in self._parameters if p.grad is not None])
        everyone = dist.group.WORLD
        assert everyone
        self._see(exchange(padded(flat, everyone.size()), everyone))


# --- FSDP2


@dataclass(frozen=True)
class Layer:
    """One FSDP2 module and the layout of its flat gradient, [ranks, Σ columns] before the reduce-scatter."""

    module: "FSDPModule"
    parameters: list[int]  # its own, as indices into the model's
    columns: list[int]  # of each parameter in one rank's slice: whole rows of dimension 0, padded with zeros


def _layers_of(model: nn.Module, leaves: dict[str, torch.Tensor], shards: int) -> list[Layer]:
    index = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    rows = [local(leaf).shape for leaf in leaves.values()]
    found = []
    for module in model.modules():
        if is_fully_sharded(module):
            inner = (m for m in module.modules() if is_fully_sharded(m) and m is not module)
            nested = {id(parameter) for m in inner for parameter in m.parameters()}
            own = [index[id(p)] for p in module.parameters() if id(p) not in nested]
            columns = [math.ceil(rows[i][0] / shards) * math.prod(rows[i][1:]) for i in own]
            found.append(Layer(cast("FSDPModule", module), own, columns))
    return found


class ShardExchange:
    """Stands in for FSDP2's reduce-scatter (set_custom_reduce_scatter); while active it shows `see` a
    layer's number and rows. FSDP2 does not call it where there is a single shard.

    `leaves`: the model's gathered parameters.
    """

    def __init__(
        self, model: nn.Module, leaves: dict[str, torch.Tensor], see: Callable[[int, torch.Tensor], None]
    ) -> None:
        axis = mesh_axis(next(model.parameters()), "shard")
        assert axis is not None
        self.active = False
        self.position = axis.get_local_rank()  # of this rank among those that exchange with it
        self.layers = _layers_of(model, leaves, axis.size())
        for number, layer in enumerate(self.layers):
            comm = _LayerExchange(self, number, sum(layer.columns), see)
            layer.module.set_custom_reduce_scatter(comm)  # type: ignore[arg-type] # its base class is private


class _LayerExchange:
    def __init__(
        self, owner: ShardExchange, number: int, columns: int, see: Callable[[int, torch.Tensor], None]
    ) -> None:
        self._owner, self._number, self._columns, self._see = owner, number, columns, see

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if not self._owner.active:
            work: dist.Work | None = reduce_scatter(output_tensor, input_tensor, op, group, async_op)
            return work
        assert op == dist.ReduceOp.AVG, f"FSDP2 reduces with {op}, not by averaging"
        rows = exchange(input_tensor, group)
        assert rows.shape[1] == self._columns, f"layer {self._number}: {rows.shape[1]} columns in a slice"
        torch.mean(rows, dim=0, out=output_tensor)
        self._see(self._number, rows)
        return None
