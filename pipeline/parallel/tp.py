"""Tensor parallel with sequence and loss parallel (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al.
2022, arXiv 2205.05198): each rank holds some heads, some feed-forward columns and part of the vocabulary.
Between the matrix products a rank holds part of each sequence."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from pipeline.parallel import _strategy

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from pipeline.model._interface import Model
    from pipeline.model.llama import Llama


class Strategy(_strategy.Strategy):
    axes: ClassVar[tuple[str, ...]] = ("tensor",)

    def split(self, model: Model) -> None:
        split_matrices(cast("Llama", model), self.mesh["tensor"])

    def apply(self, model: Model) -> nn.Module:
        parallel = super().apply(model)
        keep_own_rows(parallel)
        return parallel

    def loss(self) -> contextlib.AbstractContextManager[object]:
        from torch.distributed.tensor.parallel import loss_parallel

        return loss_parallel()

    def complete_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Norm weights are on every rank, and each rank's gradient is the part of its tokens."""
        from pipeline.gradients.dtensor import is_partial, sum_together

        partial = [(p, p.grad) for p in parameters if p.grad is not None and is_partial(p.grad)]
        totals = sum_together([gradient for _, gradient in partial])
        for (parameter, _), total in zip(partial, totals, strict=True):
            parameter.grad = total


def split_matrices(model: Llama, mesh: DeviceMesh) -> None:
    """Distributes matrices over `mesh` [tensor] and inserts the communication, in place.

    Layouts of [B, T, D] between modules: Shard(1), a part of each sequence. Queries, keys, values, gate and
    up are split by output columns; out and down by input rows; the embedding and the head by vocabulary.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    sequence, whole = Shard(1), Replicate()
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=whole, output_layouts=sequence),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(sequence, None, None), desired_input_layouts=(whole, None, None)
                ),
                "attention.query": ColwiseParallel(),
                "attention.key": ColwiseParallel(),
                "attention.value": ColwiseParallel(),
                "attention.out": RowwiseParallel(output_layouts=sequence),
                "ffn_norm": SequenceParallel(),
                "ffn": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(whole,)),
                "ffn.gate": ColwiseParallel(),
                "ffn.up": ColwiseParallel(),
                "ffn.down": RowwiseParallel(output_layouts=sequence),
            },
        )
    model.tie()  # parallelize_module replaced both weights


def keep_own_rows(model: nn.Module) -> None:
    """The gradient of a vocabulary-parallel embedding arrives whole on every rank: keeps this rank's rows, so
    that `.grad` has the layout of its parameter."""
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        if all(placement.is_shard() for placement in parameter.placements):
            lay_out = functools.partial(DTensor.redistribute, placements=parameter.placements)
            parameter.register_hook(lay_out)  # type: ignore[no-untyped-call]
