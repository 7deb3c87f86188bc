"""What the captures see under every mesh, against gradients of single sequences from torch.func."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.batch._interface import Needs
from pipeline.config import Config
from pipeline.gradients.capture import capture_for
from pipeline.gradients.coordinates import mean_root
from pipeline.gradients.exchange import ShardExchange
from pipeline.gradients.leaves import leaves
from pipeline.gradients.microbatch import MicrobatchCapture
from pipeline.gradients.statistics import BINS_PER_OCTAVE, LOWEST_OCTAVE, GradientStatistics
from pipeline.gradients.worker import WorkerCapture
from tests.gradients.support import (
    COUNTS,
    SEQUENCES,
    SMALL,
    Fixed,
    distributed,
    fixed_direction,
    full_gradient,
    group_means,
    mean_loss,
    of_all_meshes,
    run_step,
    sequence_gradients,
    sequence_gradients_of,
    tokens,
    units,
    workers,
)
from tests.meshes import MESHES
from tests.support import config

Seen = tuple[GradientStatistics, Tensor]
VARIANTS = [("false", None), ("false", 3), ("true", None)]  # (tied, limit)


def configured(mesh: str, tied: str = "false") -> Config:
    return config(*MESHES[mesh], *SMALL, f"model.tied={tied}")


def microbatches(rank: int, mesh: str) -> list[Seen]:
    seen = []
    for tied, limit in VARIANTS:
        strategy, model = distributed(rank, configured(mesh, tied))
        capture = MicrobatchCapture(model, strategy.ranks, limit, Fixed(model))
        run_step(strategy, model, capture)
        statistics = run_step(strategy, model, capture)  # the second step must not see the first
        seen.append((statistics, full_gradient(model)))
    return seen


@pytest.fixture(scope="module")
def seen_microbatches() -> dict[str, list[list[Seen]]]:
    return of_all_meshes(list(MESHES), microbatches)


@pytest.mark.parametrize("mesh", MESHES)
def test_microbatches(mesh: str, seen_microbatches: dict[str, list[list[Seen]]]):
    """Norms, products with a direction and the gradient itself, of unequal units with an idle rank; with a
    tied head, and measuring the first three only."""
    observed = seen_microbatches[mesh]
    for variant, (tied, limit) in enumerate(VARIANTS):
        statistics, mean = observed[0][variant]
        for other in observed:
            assert other[variant][0] == statistics and torch.equal(other[variant][1], mean)
        composed = configured(mesh, tied)
        gradients = sequence_gradients(composed)
        truth = gradients.mean(0)
        assert (mean.double() - truth).norm() < 1e-6 * truth.norm()
        assert_equals(statistics, group_means(gradients, units())[:limit], fixed_direction(composed))


def assert_equals(statistics: GradientStatistics, g: Tensor, direction: Tensor) -> None:
    """`g`: the mean gradients of the units that were to be measured."""
    n = torch.tensor(COUNTS[: len(g)], dtype=torch.float64)
    squares = g.square().sum(1)
    assert (statistics.units, statistics.sequences) == (len(n), SEQUENCES)
    assert statistics.measured_sequences == int(n.sum())
    assert statistics.sum_weighted_sq_norm == pytest.approx(float(n @ squares), rel=1e-6)
    assert statistics.sum_sq_norm == pytest.approx(float(squares.sum()), rel=1e-6)
    products, along = g @ direction, statistics.along
    assert along.sequences == tuple(COUNTS[: len(g)])
    assert along.products == pytest.approx(products.tolist(), abs=1e-6 * float(products.abs().max()))
    assert along.sq_norm == pytest.approx(float(direction @ direction), rel=1e-6)


def accumulated(rank: int, mesh: str) -> Seen:
    strategy, model = distributed(rank, configured(mesh))
    capture = WorkerCapture(model, strategy.ranks, coordinates=True)
    run_step(strategy, model, capture)
    return run_step(strategy, model, capture), full_gradient(model)


WORKER_MESHES = ["ddp2", "fsdp2", "fsdp3", "hsdp2x2", "fsdp2 x tp2"]


@pytest.fixture(scope="module")
def seen_workers() -> dict[str, list[Seen]]:
    return of_all_meshes(WORKER_MESHES, accumulated)


@pytest.mark.parametrize("mesh", WORKER_MESHES)
def test_workers(mesh: str, seen_workers: dict[str, list[Seen]]):
    """The exact Gram matrix and the variance of every coordinate, and the average that replaces the usual."""
    composed, observed = configured(mesh), seen_workers[mesh]
    statistics, mean = observed[0]
    gradients = sequence_gradients(composed)
    truth = gradients.mean(0)
    assert (mean.double() - truth).norm() < 1e-6 * truth.norm()
    for other, its_mean in observed:
        assert np.array_equal(other.workers.gram, statistics.workers.gram) and torch.equal(its_mean, mean)
    groups = workers(composed.parallel.data_ranks)
    g, n = group_means(gradients, groups).numpy(), np.array([len(group) for group in groups])
    assert statistics.workers.sequences == tuple(n)
    gram = g @ g.T
    assert np.abs(statistics.workers.gram - gram).max() < 1e-6 * gram.max()
    assert statistics.variance == pytest.approx(
        float(n @ ((g - truth.numpy()) ** 2).sum(1) / (len(n) - 1)), rel=1e-5
    )

    variance = n @ (g - truth.numpy()) ** 2 / (len(n) - 1)
    coordinates = statistics.coordinates
    deviation = np.sqrt(variance).sum() / mean_root(len(n))
    assert coordinates.sum_deviation == pytest.approx(deviation, rel=1e-5)
    assert coordinates.sum_magnitude == pytest.approx(np.abs(truth.numpy()).sum(), rel=1e-5)
    used = (g != 0).any(0)
    assert sum(coordinates.ratio_counts) == pytest.approx(used.sum(), abs=0.5)
    octaves = np.log2(variance[used] / truth.numpy()[used] ** 2)
    for share in (0.1, 0.5, 0.9):
        bound = np.log2(coordinates.ratio_quantile(share))
        assert 0 <= bound - np.quantile(octaves, share) < 1.5 / BINS_PER_OCTAVE
    assert (
        np.floor((octaves.max() - LOWEST_OCTAVE) * BINS_PER_OCTAVE)
        == np.nonzero(coordinates.ratio_counts)[0][-1]
    )


def exchanged_dtypes(rank: int, mesh: str) -> set[torch.dtype]:
    strategy, model = distributed(rank, config(*MESHES[mesh], *SMALL, "parallel.precision=bfloat16"))
    seen = set()
    exchange = ShardExchange(model, leaves(model), lambda layer, rows: seen.add(rows.dtype))
    exchange.active = True
    with strategy.micro_batch(model, last=True, whole=True):
        mean_loss(model, tokens().to(strategy.ranks.device)).backward()
    return seen


def test_gradients_are_summed_over_ranks_in_float32_when_computed_in_bfloat16():
    assert of_all_meshes(["fsdp2"], exchanged_dtypes) == {"fsdp2": [{torch.float32}] * 2}


@pytest.mark.parametrize("limit", [None, 3])
def test_estimates_of_a_real_model_are_unbiased(limit: int | None):
    """Batches of 16 sequences drawn with replacement from 32: variance, signal and the variance along a
    direction against those of the population, all 32 gradients from torch.func."""
    composed = configured("single")
    population = sequence_gradients(composed, 32)
    mean, direction = population.mean(0), fixed_direction(composed)
    truths = [
        float((population - mean).square().sum(1).mean()),
        float(mean @ mean),
        float((population @ direction).var(correction=0)),
    ]
    strategy, model = distributed(0, composed)
    capture = MicrobatchCapture(model, strategy.ranks, limit, Fixed(model))
    draws = torch.randint(0, 32, (250, 8, 2), generator=torch.Generator().manual_seed(3))
    estimates = []
    for units_of_draw in draws:
        model.zero_grad()
        capture.start_step([2] * 8)
        for unit, sequences in enumerate(units_of_draw):
            loss = mean_loss(model, tokens(32)[sequences].to(strategy.ranks.device)) / 8
            with capture.unit(unit):
                loss.backward()
        mean_sq_norm = float(full_gradient(model).double().square().sum())
        statistics = capture.statistics(capture.sums().tolist(), mean_sq_norm)
        estimates.append([statistics.variance, statistics.signal, statistics.along.variance])
    errors = np.std(estimates, axis=0) / np.sqrt(len(estimates))
    assert (np.abs(np.mean(estimates, axis=0) - truths) < 3 * errors).all()
    assert (errors < 0.2 * np.array(truths)).all()  # else the line above says nothing


def test_nothing_is_seen_outside_a_unit():
    strategy, model = distributed(0, configured("single"))
    capture = MicrobatchCapture(model, strategy.ranks)
    capture.start_step([2, 2])
    mean_loss(model, tokens()[:2].to(strategy.ranks.device)).backward()
    assert capture.sums().tolist() == [0, 0]


def test_directions_of_the_trainer_lag_one_step_behind():
    """`momentum` is the optimizer's state, `previous` the gradient of the measured step before."""
    strategy, model = distributed(0, configured("single"))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    captures = {
        name: capture_for(Needs("microbatch", direction=name), model, optimizer, strategy.ranks)
        for name in ("momentum", "previous")
    }
    # Before the first step there is no direction, and only the norms are measured.
    assert [run_step(strategy, model, capture).along for capture in captures.values()] == [None, None]
    first = full_gradient(model).double()
    optimizer.step()
    moment = torch.cat([optimizer.state[p]["exp_avg"].flatten().cpu() for p in parameters]).double()
    gradients = group_means(sequence_gradients_of(copy.deepcopy(model).cpu()), units())
    for name, direction in (("momentum", moment), ("previous", first)):
        along = run_step(strategy, model, captures[name]).along
        assert along.products == pytest.approx((gradients @ direction).tolist(), rel=1e-4, abs=1e-7)
        assert along.sq_norm == pytest.approx(float(direction @ direction), rel=1e-5)
