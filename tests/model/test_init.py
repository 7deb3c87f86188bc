from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from pipeline.model.init import initialise
from pipeline.model.llama import Llama
from tests.distributed import gloo_ranks
from tests.support import config


def weights(*overrides: str, seed: int = 0, device: str = "meta") -> dict[str, Tensor]:
    with torch.device(device):
        model = Llama(config(*overrides).model)
    initialise(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_meta_and_cpu_construction_start_equal() -> None:
    assert_equal(weights("model=tiny"), weights("model=tiny", device="cpu"))


def test_the_global_generator_and_the_order_of_parameters_do_not_matter() -> None:
    expected = weights("model=tiny")
    torch.manual_seed(123)
    with torch.device("meta"):
        model = Llama(config("model=tiny").model)
    order = list(model.named_parameters())
    model._modules = dict(reversed(model._modules.items()))
    assert [name for name, _ in model.named_parameters()] != [name for name, _ in order]
    initialise(model, 0)
    assert_equal(dict(sorted(model.named_parameters())), dict(sorted(expected.items())))


def test_a_deeper_model_starts_with_the_same_first_layer() -> None:
    shallow, deep = weights("model=tiny"), weights("model=tiny", "model.layers=4")
    assert torch.equal(shallow["blocks.0.ffn.up.weight"], deep["blocks.0.ffn.up.weight"])


def test_every_name_and_every_seed_has_its_own_weights() -> None:
    matrices = [w for seed in (0, 1) for w in weights("model=tiny", seed=seed).values() if w.dim() == 2]
    heads = {tuple(matrix.flatten()[:8].tolist()) for matrix in matrices}
    assert len(heads) == len(matrices)


def test_standard_deviations() -> None:
    layers = 3
    for name, weight in weights("model=tiny", f"model.layers={layers}", "model.width=256").items():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
        sigma = 0.02 / math.sqrt(2 * layers) if residual else 0.02
        error = 5 / math.sqrt(weight.numel())  # five standard errors, of the mean and above those of sigma
        assert float(weight.mean()) == pytest.approx(0, abs=sigma * error), name
        assert float(weight.std()) == pytest.approx(sigma, rel=error), name


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_tied_head_shares_the_embedding(device: str) -> None:
    with torch.device(device):
        model = Llama(config("model=tiny", "model.tied=true").model)
    initialise(model, 0)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, weights("model=tiny")["embedding.weight"])


def test_nothing_is_left_as_to_empty_left_it() -> None:
    with torch.device("meta"):
        model = Llama(config("model=tiny").model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialise(model, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_parameter_without_a_rule_is_refused() -> None:
    model = Llama(config("model=tiny").model)
    model.blocks[1].ffn.up.bias = nn.Parameter(torch.zeros(176))
    with pytest.raises(AssertionError, match=r"blocks\.1\.ffn\.up\.bias"):
        initialise(model, 0)


def sharded_weights(rank: int) -> dict[str, Tensor]:
    """From the meta device, one block sharded by FSDP, one matrix of it by tensor parallelism as well."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        model = Llama(config("model=tiny").model)
    everything = init_device_mesh("cpu", (2,))
    fully_shard(model.blocks[0], mesh=everything)
    parallelize_module(model.blocks[1].ffn, mesh["tensor"], {"up": ColwiseParallel()})
    fully_shard(model.blocks[1].ffn.up, mesh=mesh["data"])
    initialise(model, 7)
    return {
        n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in model.named_parameters()
    }


def test_sharded_models_start_equal() -> None:
    for of_rank in gloo_ranks(2, sharded_weights):
        assert_equal(of_rank, weights("model=tiny", seed=7))
