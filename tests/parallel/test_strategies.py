"""Every strategy on every mesh: the same weights and the same loss, and storage that is really divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from pipeline.config import ConfigError
from pipeline.gradients.dtensor import local
from tests.distributed import gloo_ranks
from tests.gradients.support import (
    SMALL,
    distributed,
    full_gradient,
    mean_loss,
    of_all_meshes,
    plain_model,
    tokens,
)
from tests.meshes import MESHES
from tests.support import config


def weights_and_loss(rank: int, mesh: str) -> dict[str, Any]:
    """A whole gradient of 12 sequences, each data-parallel rank with an equal share of them."""
    found: dict[str, Any] = {}
    for variant, more in VARIANTS.items():
        strategy, model = distributed(rank, config(*MESHES[mesh], *SMALL, *more))
        ranks = strategy.ranks
        batch = tokens(12)[ranks.data_rank :: ranks.data_ranks].to(ranks.device)
        with strategy.micro_batch(model, last=True, whole=False), strategy.loss():
            with strategy.autocast():
                loss = mean_loss(model, batch)
            loss.backward()
        strategy.complete_gradients(list(model.parameters()))
        found[variant] = {
            "loss": ranks.sum(loss.detach().double().view(1))[0] / ranks.world_size,
            "gradient": full_gradient(model),
            "elements": sum(local(p).numel() for p in model.parameters()),
            "weights": {
                name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
                for name, p in model.named_parameters()
            },
        }
    return found


VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "tied": ["model.tied=true"],
    "recomputed": ["parallel.activation_checkpointing=true"],
    "kept gathered": ["parallel.reshard_after_forward=false"],
    "bfloat16": ["parallel.precision=bfloat16"],
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    return of_all_meshes(list(MESHES), weights_and_loss)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", MESHES)
def test_weights_loss_and_gradient_do_not_depend_on_the_mesh(mesh: str, variant: str, found: Any):
    """Weights to the last bit; loss and gradient to rounding, of float32 or of bfloat16."""
    composed = config(*MESHES[mesh], *SMALL, *VARIANTS[variant])
    model = plain_model(composed)
    loss = mean_loss(model, tokens(12))
    loss.backward()
    truth = full_gradient(model)
    rounding = 2e-2 if variant == "bfloat16" else 1e-6
    for rank in found[mesh]:
        seen = rank[variant]
        weights = dict(model.named_parameters())
        assert seen["weights"].keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in seen["weights"].items())
        assert seen["loss"] == pytest.approx(loss.item(), rel=rounding / 2)
        assert (seen["gradient"] - truth).norm() < rounding * truth.norm()
        if variant == "bfloat16":  # and it did compute in it
            assert (seen["gradient"] - truth).norm() > 1e-4 * truth.norm()


@pytest.mark.parametrize("mesh", MESHES)
def test_storage_is_divided(mesh: str, found: Any):
    parallel = config(*MESHES[mesh]).parallel
    whole = sum(weight.numel() for weight in found[mesh][0]["plain"]["weights"].values())
    held = [rank["plain"]["elements"] for rank in found[mesh]]
    replicas = parallel.world_size // (parallel.shard * parallel.tensor)
    norms = 3 * 32  # tensor parallel ranks all have the norm weights
    assert sum(held) == replicas * (whole + (parallel.tensor - 1) * norms)
    # Unequal by at most one row of each parameter
    assert max(held) - min(held) <= 13 * 48


def compiled(rank: int) -> list[torch.Tensor]:
    gradients = []
    for compile_ in ("false", "true"):
        strategy, model = distributed(rank, config("parallel=fsdp", *SMALL, f"parallel.compile={compile_}"))
        with strategy.micro_batch(model, last=True, whole=False):
            mean_loss(model, tokens(4).to(strategy.ranks.device)).backward()
        gradients.append(full_gradient(model))
    return gradients


def test_compiled_blocks_under_fsdp():
    for eager, fused in gloo_ranks(2, compiled):
        assert (fused - eager).norm() < 1e-6 * eager.norm()


@pytest.mark.parametrize("mesh", ["parallel=tp", "parallel=fsdp_tp"])
def test_compiling_with_tensor_parallel_is_refused(mesh: str):
    with pytest.raises(ConfigError, match="wrong gradients or fails"):
        config(mesh, "parallel.compile=true")
