"""Initial weights that depend on the seed and the parameter's name alone.

One generator per parameter fills the whole tensor in float32 on the CPU, and each rank keeps its part. So a
run starts from the same weights on one process, under DDP, FSDP or tensor parallelism, on any device. (A
device-wide generator cannot promise that: on a CPU mesh it gives every rank the same shard.)
"""

from __future__ import annotations

import hashlib

import torch

from pipeline.gradients.dtensor import is_spread
from pipeline.model._interface import Model


@torch.no_grad()
def initialise(model: Model, seed: int, device: torch.device | str = "cpu") -> None:
    """Sets every parameter, in place, as the model says; one on the meta device is first materialised on
    `device`."""
    if any(parameter.is_meta for parameter in model.parameters()):
        _materialise(model, device)
        model.tie()
    assert not list(model.buffers()), "a buffer would keep what to_empty left in it"
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        full = model.initial_weight(name, parameter.shape, generator)
        if is_spread(parameter):
            from torch.distributed.tensor import distribute_tensor

            full = full.to(parameter.device_mesh.device_type)
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


def _materialise(model: Model, device: torch.device | str) -> None:
    """Gives parameters on the meta device memory on this one."""
    if any(map(is_spread, model.parameters())):
        model.to_empty(device=device)
        return
    # The same without empty_like, which for meta tensors imports sympy (half a second).
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device
            )
            setattr(module, name, torch.nn.Parameter(memory, requires_grad=parameter.requires_grad))
