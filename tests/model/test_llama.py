from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.export import transformers_name
from pipeline.model.llama import Llama, loss_sum, rotary_tables
from tests.model.support import SHAPES, TIED, config, random_llama, random_tokens, reference


# MicroLlama, TinyLlama and OpenLlama: Lau et al. 2024, Table 4, and the released models' own counts.
@pytest.mark.parametrize(
    ("size", "parameters", "tolerance"),
    [
        ("10m", 10e6, 0.05),
        ("60m", 60e6, 0.05),
        ("microllama_300m", 304.6e6, 0.05 / 304.6),
        ("tinyllama_1b", 1_100_048_384, 0),
        ("openllama_3b", 3_426_473_600, 0),
    ],
)
def test_parameter_counts_of_the_literature(size: str, parameters: float, tolerance: float) -> None:
    assert _parameters(size) == pytest.approx(parameters, rel=tolerance)


def test_the_demo_model_is_tiny() -> None:
    assert _parameters("tiny") < 0.5e6


def _parameters(size: str) -> int:
    model = config(f"model={size}").model
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Llama(model).parameters())
    assert count == model.parameters
    return count


def test_a_tied_head_saves_one_embedding() -> None:
    model = config(*TIED).model
    assert sum(parameter.numel() for parameter in Llama(model).parameters()) == model.parameters


@pytest.mark.parametrize("overrides", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(overrides: list[str]) -> None:
    configuration = config(*overrides)
    ours = random_llama(configuration)
    theirs = reference(configuration, ours)
    tokens, targets = (random_tokens(configuration.model, 2, 65, seed) for seed in (1, 2))

    logits, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.5  # the comparison would mean little between logits near 0

    loss_sum(logits, targets).backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = gradients[transformers_name(name)]
        assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm(), name


def test_logits_before_a_changed_token_stay_bit_for_bit() -> None:
    configuration = config("model=tiny")
    model = random_llama(configuration)
    tokens = random_tokens(configuration.model, 2, 40)
    before = model(tokens)
    for t in (0, 1, 17, 39):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % configuration.model.vocab
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_norms_compute_in_float32() -> None:
    norm = random_llama(config("model=tiny")).norm
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = norm.weight.bfloat16().double() * x.double() / (x.double().square().mean(-1, True) + 1e-5).sqrt()
    assert torch.equal(copy.deepcopy(norm).bfloat16()(x), exact.bfloat16())


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    configuration = config("model=tiny")
    model, tokens = random_llama(configuration), random_tokens(configuration.model, 2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(tokens)
    assert rounded.dtype is torch.bfloat16
    exact = model(tokens)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_loss_is_the_sum_over_tokens_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator).bfloat16()
    targets = torch.randint(11, (3, 5), generator=generator)
    by_hand = 0.0
    for b in range(3):
        for t in range(5):
            row = logits[b, t].double()
            by_hand += float(row.exp().sum().log() - row[targets[b, t]])
    summed = loss_sum(logits, targets)
    assert summed.dtype is torch.float32
    assert float(summed) == pytest.approx(by_hand, rel=1e-6)


def test_a_rotary_table_made_in_evaluation_serves_training() -> None:
    configuration = config("model=tiny")
    model, tokens = random_llama(configuration), random_tokens(configuration.model, 1, 23)
    rotary_tables.cache_clear()
    with torch.inference_mode():
        expected = model(tokens)
    logits = model(tokens)
    loss_sum(logits, tokens).backward()
    assert torch.equal(logits, expected)


def test_rotary_tables_are_exact_under_autocast() -> None:
    rotary_tables.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, signed_sin = rotary_tables(2048, 64, 10000.0, torch.device("cpu"))
    for m, p in ((0, 0), (1, 0), (2047, 0), (2047, 5), (1000, 31)):
        angle = m * 10000.0 ** (-2 * p / 64)
        assert float(cos[m, 0, p]) == pytest.approx(math.cos(angle), abs=2e-4)  # float32 angles up to 2047
        assert float(signed_sin[m, 0, p + 32]) == pytest.approx(math.sin(angle), abs=2e-4)


def test_recomputed_activations_give_the_same_loss_and_gradients() -> None:
    configuration = config("model=tiny")
    plain = random_llama(configuration)
    recomputing = copy.deepcopy(plain)
    recomputing.prepare(dataclasses.replace(configuration.parallel, activation_checkpointing=True))
    assert [name for name, _ in recomputing.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    tokens, targets = (random_tokens(configuration.model, 2, 32, seed) for seed in (1, 2))
    losses, kept = [], []
    for model in (plain, recomputing):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            losses.append(loss_sum(model(tokens), targets))
        losses[-1].backward()
        kept.append(sum(saved))
    assert torch.equal(losses[0], losses[1])
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert kept[1] < kept[0] / 3  # and it does save memory


def test_blocks_are_neither_compiled_nor_recomputed_unless_asked() -> None:
    configuration = config("model=tiny")
    model = Llama(configuration.model)
    model.prepare(configuration.parallel)
    for block in model.blocks:
        assert not block.recompute and block._compiled_call_impl is None


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients() -> None:
    configuration = config("model=tiny", "model.layers=1")
    plain = random_llama(configuration)
    compiled = copy.deepcopy(plain)
    compiled.prepare(dataclasses.replace(configuration.parallel, compile=True))
    assert compiled.blocks[0]._compiled_call_impl is not None
    tokens, targets = (random_tokens(configuration.model, 2, 32, seed) for seed in (1, 2))
    losses = [loss_sum(model(tokens), targets) for model in (plain, compiled)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for each in losses:
        each.backward()
    for (name, a), (same, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == same
        assert (a.grad - b.grad).norm() < 1e-5 * a.grad.norm(), name


def test_attention_never_falls_back_to_the_quadratic_kernel() -> None:
    configuration = config("model=tiny")
    tokens = random_tokens(configuration.model, 1, 32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where no such kernel takes these inputs
        loss_sum(random_llama(configuration)(tokens), tokens).backward()
