"""Initial weights that depend on the seed and the parameter's name alone.

One generator per parameter fills the whole tensor in float32 on the CPU, and each rank keeps its part. So a
run starts from the same weights on one process, under DDP, FSDP or tensor parallelism, on any device. (A
device-wide generator cannot promise that: on a CPU mesh it gives every rank the same shard.)
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.model.llama import Llama

STANDARD_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("attention.out.weight", "ffn.down.weight")  # what is added to the residual stream


@torch.no_grad()
def initialise(model: Llama, seed: int, device: torch.device | str = "cpu") -> None:
    """Sets every parameter, in place; a model on the meta device is first materialised on `device`.

    Matrices are normal(0, 0.02), as in GPT (Radford et al. 2018, section 4.1). Those whose output is added
    to the residual stream are scaled by 1/sqrt(N), N = 2·layers additions (GPT-2: Radford et al. 2019,
    section 2.3), so that the stream's variance does not grow with depth. Norms are 1.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        model.tie()
    assert not list(model.buffers()), "a buffer would keep what to_empty left in it"
    for name, parameter in model.named_parameters():
        full = initial_weight(name, parameter.shape, seed, model.model.layers)
        if isinstance(parameter, DTensor):
            full = full.to(parameter.device_mesh.device_type)
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


def initial_weight(name: str, shape: torch.Size, seed: int, layers: int) -> Tensor:
    """The whole float32 tensor of the parameter `name`."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    assert len(shape) == 2, f"{name}: no rule for the initial values of shape {tuple(shape)}"
    scale = 1 / math.sqrt(2 * layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.empty(shape).normal_(0.0, STANDARD_DEVIATION * scale, generator=generator)
