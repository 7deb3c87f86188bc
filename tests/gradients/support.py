"""One step of micro-batches under any mesh, and the truth about it from per-sequence gradients."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import Config
from pipeline.gradients.capture import Capture
from pipeline.gradients.dtensor import local
from pipeline.gradients.statistics import GradientStatistics
from pipeline.model.init import initialise
from pipeline.model.llama import Llama, loss_sum
from pipeline.parallel import strategy_class
from pipeline.parallel._strategy import Strategy
from tests.distributed import gloo_ranks, ranks_of
from tests.meshes import MESHES
from tests.support import config

SMALL = [
    "data.micro_batch=2",
    "model.layers=1",
    "model.width=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=48",
]

# 13 sequences in micro-batches of 2: 7 units, the last one short, and on 2 or 4 ranks one rank without a share
SEQUENCES, MICRO = 13, 2
COUNTS = [2, 2, 2, 2, 2, 2, 1]


def tokens(sequences: int = SEQUENCES) -> Tensor:
    return torch.randint(0, 272, (sequences, 33), generator=torch.Generator().manual_seed(1))


def mean_loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return loss_sum(model(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()


def plain_model(composed: Config) -> Llama:
    model = Llama(composed.model)
    initialise(model, composed.seed)
    return model


def sequence_gradients(composed: Config, sequences: int = SEQUENCES) -> Tensor:
    return sequence_gradients_of(plain_model(composed), sequences)


def sequence_gradients_of(model: Llama, sequences: int = SEQUENCES) -> Tensor:
    """Float64 [sequences, parameters], from torch.func in one vectorised pass over a float64 copy."""
    model = copy.deepcopy(model).double()
    parameters = dict(model.named_parameters())

    def loss_of_one(weights: dict[str, Tensor], sequence: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (sequence[None, :-1],))
        return torch.nn.functional.cross_entropy(logits[0], sequence[1:])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0))(parameters, tokens(sequences))
    return torch.cat([gradient.detach().flatten(1) for gradient in gradients.values()], dim=1)


def group_means(gradients: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Mean gradients [groups, parameters] of groups of sequences."""
    return torch.stack([gradients[list(group)].mean(0) for group in groups])


def units() -> list[list[int]]:
    """The sequences of each micro-batch."""
    return [list(range(SEQUENCES))[i : i + MICRO] for i in range(0, SEQUENCES, MICRO)]


def workers(ranks: int) -> list[list[int]]:
    """The sequences of each data-parallel rank."""
    return [[sequence for unit in units()[rank::ranks] for sequence in unit] for rank in range(ranks)]


def distributed(rank: int, composed: Config) -> tuple[Strategy, torch.nn.Module]:
    strategy = strategy_class(composed.parallel.strategy)(composed, ranks_of(composed, rank))
    with torch.device("meta"):
        model = Llama(composed.model)
    return strategy, strategy.apply(model)


def run_step(strategy: Strategy, model: torch.nn.Module, capture: Capture) -> GradientStatistics:
    """One measured step over all SEQUENCES; gradients are left in `.grad`."""
    ranks, parameters = strategy.ranks, list(model.parameters())
    model.zero_grad()
    capture.start_step(COUNTS)
    rounds = -(-len(COUNTS) // ranks.data_ranks)
    whole = not strategy.parallel.shard_gradients if capture.whole is None else capture.whole
    for index in range(rounds):
        unit = index * ranks.data_ranks + ranks.data_rank
        count = COUNTS[unit] if unit < len(COUNTS) else 0
        batch = (tokens()[unit * MICRO :][:count] if count else tokens()[:1]).to(ranks.device)
        with strategy.micro_batch(model, last=index + 1 == rounds, whole=whole), strategy.loss():
            loss = mean_loss(model, batch) * (count * ranks.data_ranks / SEQUENCES)
            with capture.unit(unit):
                loss.backward()
    strategy.complete_gradients(parameters)
    mean = full_gradient(model)
    return capture.statistics(ranks.sum(capture.sums()), float(mean.double().square().sum()))


def full_gradient(model: torch.nn.Module) -> Tensor:
    """[parameters], on every rank."""
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in gradients]).cpu()


class Fixed:
    """A direction that is known in full: random, of the size of the gradient's typical element."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parts = []
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            whole = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(parameter.device)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = local(distribute_tensor(whole, mesh, placements, src_data_rank=None))
            self._parts.append(whole)

    known = True

    def parts(self) -> list[Tensor]:
        return self._parts

    def step_done(self) -> None:
        pass


def fixed_direction(composed: Config) -> Tensor:
    model = plain_model(composed)
    return torch.cat([part.flatten() for part in Fixed(model).parts()]).double()


def of_all_meshes(names: Sequence[str], function: Callable[..., object]) -> dict[str, list[Any]]:
    """What `function(rank, mesh name)` returns on each rank of each mesh; one set of processes for all meshes of
    a world size, since starting them takes longer than their work."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name in names:
        by_size[config(*MESHES[name]).parallel.world_size].append(name)
    results: dict[str, list[Any]] = {}
    for size, meshes in by_size.items():
        ranks = gloo_ranks(size, _each, meshes, function)
        results |= {name: [rank[name] for rank in ranks] for name in meshes}
    return results


def _each(rank: int, meshes: list[str], function: Callable[..., object]) -> dict[str, object]:
    return {name: function(rank, name) for name in meshes}
