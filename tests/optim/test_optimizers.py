"""Every optimizer trains, keeps what the config check says of it, and moves between meshes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import optim
from pipeline.gradients.direction import FIRST_MOMENTS, Momentum
from pipeline.optim._evaluation import Evaluating, Evaluation
from tests.distributed import column, train_here
from tests.support import config

OPTIMIZERS = ["adagrad", "adamw", "sgd", "signum"]
ALL = [
    "adagrad", "adagrad_norm", "adam", "adamp", "adamw", "backtracking", "muon", "prox_sgd", "sam", "sgd",
    "signum", "swa",
]  # fmt: skip
TINY = ["data.sequence_length=64", "batch.size=16", "budget.tokens=20480", "lr.warmup_tokens=2k"]


def test_every_file_is_an_option():
    assert optim.names() == sorted([*ALL, "coda"])  # which has a model and tests of its own


@pytest.mark.parametrize("name", ALL)
def test_keeps_a_first_moment_where_it_says_so(name: str):
    composed = config(f"optim={name}").optim
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    optimizer = optim.build(layers, composed)
    layers(torch.ones(1, 3)).sum().backward()
    if isinstance(optimizer, Evaluating):
        optimizer.step(Evaluation(1, 0.0, 1.0, None, lambda: -1e9, lambda: 1.0, 0, lambda: None))
    else:
        optimizer.step()
    parameters = list(layers.parameters())
    kept = [[key for key in FIRST_MOMENTS if key in optimizer.state[p]] for p in parameters]
    assert [len(keys) for keys in kept] == [int(optim.keeps_first_moment(composed))] * 4
    if optim.keeps_first_moment(composed):
        assert [part.shape for part in Momentum(parameters, optimizer).parts()] == [
            p.shape for p in parameters
        ]


def test_signum_is_its_formula():
    """m ← β m + (1 − β) g; w ← (1 − lr λ) w − lr sign(m)."""
    composed = config("optim=signum", "optim.lr=0.01", "optim.momentum=0.8", "optim.weight_decay=0.1").optim
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = optim.build(layer, composed)
    weight, moment = layer.weight.detach().clone(), torch.zeros(3, 4)
    for _ in range(5):
        gradient = torch.randn(3, 4)
        layer.weight.grad, layer.bias.grad = gradient.clone(), torch.zeros(3)
        optimizer.step()
        moment = 0.8 * moment + 0.2 * gradient
        weight = (1 - 0.01 * 0.1) * weight - 0.01 * moment.sign()
        torch.testing.assert_close(layer.weight.detach(), weight)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon"])
def test_learns_and_does_not_depend_on_the_mesh(name: str, home: Path, small_corpus: list[str]):
    overrides = [*TINY, *small_corpus, f"optim={name}"]
    here = column(train_here(config(*overrides)), "train/loss")
    assert here[-1] < here[0] - 0.3
    sharded = column(train_here(config(*overrides, "parallel=fsdp")), "train/loss")
    assert sharded[:2] == pytest.approx(here[:2], rel=1e-5)
    # Signs, and in AdaGrad's first steps too: those of gradients near 0 depend on rounding.
    assert sharded == pytest.approx(here, rel=1e-3 if name in ("adamw", "sgd") else 5e-2)


@pytest.mark.parametrize("name", ["sgd", "signum", "muon"])
def test_inner_products_with_its_first_moment(name: str, home: Path, small_corpus: list[str]):
    overrides = [*TINY, *small_corpus, f"optim={name}", "batch=inner_product", "batch.max_size=256"]
    run = train_here(config(*overrides))
    tested = column(run, "test/theta_eff")
    assert len(tested) > 3 and all(value > 0 for value in tested)


def test_adascale_raises_the_rate_with_the_batch_between_one_and_linear(home: Path, small_corpus: list[str]):
    overrides = [*TINY, *small_corpus, "optim=sgd", "lr.batch_scaling=adascale", "batch=linear"]
    overrides += ["batch.size=8", "batch.max_size=32", "batch.ramp_tokens=10k", "batch.round_to=8"]
    here = train_here(config(*overrides))
    factors, sizes = column(here, "lr/batch_factor"), column(here, "batch/size")
    grown = [(f, s / 8) for f, s in zip(factors, sizes, strict=True) if s > 8]
    assert len(grown) > 5
    assert all(1 < factor < growth for factor, growth in grown[:-1])
    two = train_here(config(*overrides, "parallel=ddp"))
    assert column(two, "lr/batch_factor")[:6] == pytest.approx(factors[:6], rel=1e-4)
