"""Tensors that are spread over ranks (DTensor): this rank's part, its share of a sum over ranks, and sums
that are still open."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_spread(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Where nobody has imported those, which takes a second, there are none."""
    # Another thread may be about to import it.
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards its parameters, in the same way."""
    return isinstance(module, getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, …] -> [rows, 1, …], spread over ranks as the rows are; a vector's rows are its elements."""
    if tensor.dim() < 2:
        return tensor
    sums = tensor.sum(dim=tuple(range(1, tensor.dim())), keepdim=True)
    if not is_spread(sums):
        return sums
    from torch.distributed.tensor import Replicate

    closed = [Replicate() if placement.is_partial() else placement for placement in sums.placements]
    return sums.redistribute(placements=closed)


def shards(tensor: torch.Tensor) -> int:
    """Number of different parts that ranks hold of it; all other ranks of its mesh hold copies."""
    if not is_spread(tensor):
        return 1
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh
    return math.prod(
        mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate)
    )


def shares(tensors: Iterable[torch.Tensor], ranks: int) -> list[float]:
    """Of each tensor: what the part that a rank holds counts for in a sum over `ranks` ranks, which hold all
    of it between them. 1 for a shard that no other has, 1/4 where four have copies."""
    return [shards(tensor) / ranks for tensor in tensors]


def mesh_axis(tensor: torch.Tensor, axis: str) -> DeviceMesh | None:
    """The axis of that name of the mesh over which `tensor` is spread, if it has one."""
    if not is_spread(tensor) or axis not in (tensor.device_mesh.mesh_dim_names or ()):
        return None
    return tensor.device_mesh[axis]


def is_partial(tensor: torch.Tensor | None) -> bool:
    """Whether its value is the sum of what the ranks hold."""
    return is_spread(tensor) and all(placement.is_partial() for placement in tensor.placements)


def sum_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Partial DTensors of one mesh as replicated ones, in one all-reduce of all."""
    if not tensors:
        return []
    from torch.distributed.tensor import DTensor, Replicate

    first = tensors[0]
    assert is_spread(first)
    flat = torch.cat([local(tensor).flatten() for tensor in tensors])
    dist.all_reduce(flat, group=first.device_mesh.get_group())
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        DTensor.from_local(part.view(tensor.shape), first.device_mesh, [Replicate()], run_check=False)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
