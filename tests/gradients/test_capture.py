"""What the captures see, against gradients taken one unit at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.gradients.capture import capture_for
from pipeline.model.init import initialise
from pipeline.model.llama import Llama, loss_sum
from pipeline.parallel import load
from tests.distributed import gloo_ranks, ranks_of
from tests.support import config

CPU = torch.device("cpu")
UNITS = [(0, 4), (4, 4), (8, 4), (12, 3)]  # (first sequence, sequences); the last one is short


def tokens() -> Tensor:
    return torch.randint(0, 272, (15, 33), generator=torch.Generator().manual_seed(1))


def model_of(composed: Config) -> Llama:
    model = Llama(composed.model)
    initialise(model, seed=3)
    return model


def mean_loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return loss_sum(model(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()


def unit_gradients(units: list[tuple[int, int]]) -> Tensor:
    """Float64 mean gradients [units, parameters], each from its own backward pass."""
    model, rows = model_of(config()), []
    for first, count in units:
        gradients = torch.autograd.grad(
            mean_loss(model, tokens()[first : first + count]), list(model.parameters())
        )
        rows.append(torch.cat([g.flatten().double() for g in gradients]))
    return torch.stack(rows)


def expected(units: list[tuple[int, int]], gradients: Tensor) -> list[float]:
    weights = torch.tensor([count for _, count in units], dtype=torch.float64)
    squares = gradients.square().sum(1)
    return [float(weights @ squares), float(squares.sum()), float(len(units))]


def capture_on_rank(rank: int, composed: Config, estimator: str) -> tuple[list[float], Tensor]:
    """(sums over ranks, averaged gradient) of the units, dealt out to the ranks in turn."""
    ranks, strategy = ranks_of(composed, rank), load(composed.parallel.strategy)
    model = strategy.apply(model_of(composed), ranks, composed.parallel)
    capture = capture_for(estimator, model, CPU)
    mine = UNITS[rank :: ranks.world_size]
    total = sum(count for _, count in UNITS)
    for _ in range(2):  # the second step must not see the first
        model.zero_grad()
        capture.start_step()
        for index, (first, count) in enumerate(mine):
            scale = count * ranks.data_ranks / total
            sync = strategy.without_sync(model) if index + 1 < len(mine) else torch.enable_grad()
            with sync, capture.unit(count, scale):
                (mean_loss(model, tokens()[first : first + count]) * scale).backward()
        sums = ranks.sum(capture.sums().clone())
    return sums, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_microbatches_in_one_process():
    sums, mean = capture_on_rank(0, config(), "microbatch")
    gradients = unit_gradients(UNITS)
    assert sums == pytest.approx(expected(UNITS, gradients), rel=1e-6)
    weights = torch.tensor([4, 4, 4, 3], dtype=torch.float64) / 15
    assert torch.allclose(mean.double(), weights @ gradients, atol=1e-7)


def test_microbatches_are_per_sequence_gradients_when_a_unit_is_one_sequence():
    """Against torch.func: per-sequence gradients in one vectorised pass."""
    model = model_of(config())
    parameters = dict(model.named_parameters())

    def loss_of_one(weights: dict[str, Tensor], sequence: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (sequence[None, :-1],))
        return loss_sum(logits, sequence[None, 1:]) / (sequence.numel() - 1)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        per_sequence = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0))(parameters, tokens()[:6])
    squares = sum(g.double().flatten(1).square().sum(1) for g in per_sequence.values())
    capture = capture_for("microbatch", model, CPU)
    capture.start_step()
    for index in range(6):
        with capture.unit(1, 1 / 6):
            (mean_loss(model, tokens()[index : index + 1]) / 6).backward()
    assert capture.sums().tolist() == pytest.approx([squares.sum().item()] * 2 + [6], rel=1e-6)


@pytest.mark.parametrize("estimator", ["microbatch", "worker"])
def test_two_ranks(estimator: str):
    composed = config("parallel=ddp")
    (sums, mean), (other_sums, other_mean) = gloo_ranks(2, capture_on_rank, composed, estimator)
    assert sums == other_sums and torch.equal(mean, other_mean)
    gradients = unit_gradients(UNITS)
    if estimator == "worker":
        counts = [8, 7]
        shares = [[4 / 8, 0, 4 / 8, 0], [0, 4 / 7, 0, 3 / 7]]
        workers = torch.tensor(shares, dtype=torch.float64) @ gradients
        assert sums == pytest.approx(expected([(0, n) for n in counts], workers), rel=1e-6)
    else:
        assert sums == pytest.approx(expected(UNITS, gradients), rel=1e-6)


def test_an_idle_rank_is_no_unit():
    model = model_of(config())
    capture = capture_for("microbatch", model, CPU)
    capture.start_step()
    with capture.unit(0, 0.0):
        (mean_loss(model, tokens()[:1]) * 0).backward()
    assert capture.sums().tolist() == [0, 0, 0]


def test_nothing_is_seen_outside_a_unit():
    model = model_of(config())
    capture = capture_for("microbatch", model, CPU)
    capture.start_step()
    mean_loss(model, tokens()[:1]).backward()
    assert capture.sums().tolist() == [0, 0, 0]
