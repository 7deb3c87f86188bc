"""The tensors on which autograd accumulates: where one rank's gradient of one micro-batch can be seen.

Usually the parameters. Under FSDP2 the parameters are shards, and a hook on them never fires; the leaf is
the gathered parameter, a tensor object that FSDP2 keeps for the life of the model while its storage comes
and goes, and that named_parameters() shows between the public calls unshard() and reshard().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from pipeline.gradients.dtensor import is_fully_sharded

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in a checkpoint, before which DDP puts a prefix."""
    return {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}


def leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    """By parameter name. To be called by all ranks, after the model is distributed and has its weights."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    sharded = {id(parameter) for parameter in parameters.values()}
    layers = [cast("FSDPModule", module) for module in model.modules() if is_fully_sharded(module)]
    if not layers:
        return parameters
    found: dict[str, torch.Tensor] = {}
    for layer in layers:
        layer.unshard()
        for name, leaf in model.named_parameters():
            if id(leaf) not in sharded:
                found.setdefault(name, leaf)
        layer.reshard()
    missing = parameters.keys() - found.keys()
    assert not missing, f"no gathered parameter for {sorted(missing)}: their gradients cannot be seen"
    return {name: found[name] for name in parameters}
