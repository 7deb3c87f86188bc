"""The objective over all training samples and its gradient (`track.exact_gradient`): what a step's own
gradient and a batch test's numbers are estimates of.

    F(w) = (1/n) Σ ℓ_i(w), with model.l2 in each ℓ_i; of optim=prox_sgd the objective is F + h

All is computed in float64, on a copy of the model: near an optimum F − F* and g − ∇F are far below what
float32 resolves of F and g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pipeline.config import Config
from pipeline.gradients.dtensor import whole
from pipeline.optim._proximal import penalty
from pipeline.optimum import minimum
from pipeline.parallel._ranks import Ranks
from pipeline.problem import Problem
from pipeline.store import report

CHUNK = 1024  # samples at a time
CHUNK_NUMBERS = 2**24  # of a chunk of per-sample gradients: 128 MiB
MOST_NUMBERS = 10**10  # of all per-sample gradients: what a few cores compute in a minute


class _Loss(nn.Module):
    """What is minimised, summed over samples; as a module, whose weights torch.func can replace."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.model = problem, problem.model()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.problem.loss(self.model, inputs, targets)


class Exact:
    """Every rank has one and calls its methods at the same steps, since each sums over its share of the
    samples."""

    def __init__(self, config: Config, problem: Problem, ranks: Ranks) -> None:
        assert problem.samples is not None
        self._problem, self._ranks, self._samples = problem, ranks, problem.samples
        self._loss = _Loss(problem).to_empty(device=ranks.device).double()
        self._weights = dict(self._loss.named_parameters())
        self._size = sum(weight.numel() for weight in self._weights.values())
        if config.data.distribution == "by_rank":
            self._share = range(problem.train.sequences_per_epoch)
        else:
            bounds = [self._samples * rank // ranks.data_ranks for rank in range(ranks.data_ranks + 1)]
            self._share = range(bounds[ranks.data_rank], bounds[ranks.data_rank + 1])
        self._penalty = penalty(config.optim)
        found = ranks.from_main(minimum(config) if ranks.is_main else None)
        self._least = found.loss if found else None
        if found and found.loss is None and ranks.is_main:
            report(f"exact/gap is not recorded: the objective has no known minimum, because {found.why}")
        self._compared: dict[str, float] = {}  # of the step just done

    def compare(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Between the gradient of a step and its update: that gradient with what it is an estimate of.

        exact/grad_error: ‖g − ∇F‖/‖∇F‖. exact/variance: Σ‖∇ℓ_i − ∇F‖²/(n − 1), of which `stat/variance` of
        the same step is an unbiased estimate from samples drawn without replacement.
        """
        self._set(parameters)
        _, exact = self._objective()
        sampled = torch.cat([whole(gradient.detach()).double().view(-1) for gradient in gradients])
        self._compared = {"exact/grad_error": ((sampled - exact).norm() / exact.norm()).item()}
        if self._samples * self._size <= MOST_NUMBERS:
            self._compared["exact/variance"] = self._variance(exact)

    def evaluate(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """exact/loss, exact/grad_norm and, where F* is known, exact/gap = F − F* at these weights, with what
        `compare` found in the step before. With an h these are F + h and what that is over its least value;
        exact/grad_norm is still ‖∇F‖, which need not vanish there."""
        self._set(parameters)
        loss, gradient = self._objective()
        loss += sum(self._penalty(weight).item() for weight in self._weights.values() if weight.dim() > 1)
        found = {"exact/loss": loss, "exact/grad_norm": gradient.norm().item()}
        if self._least is not None:
            found["exact/gap"] = loss - self._least
        return found | self._compared

    @torch.no_grad()
    def _set(self, parameters: Sequence[Tensor]) -> None:
        for weight, parameter in zip(self._weights.values(), parameters, strict=True):
            weight.copy_(whole(parameter.detach()))

    def _chunks(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the samples. The first n places of a stream are its n samples, each once."""
        for start in range(self._share.start, self._share.stop, most):
            read = self._problem.train.read(start, min(most, self._share.stop - start))
            inputs, targets = self._problem.tensors(read, self._ranks.device)
            yield inputs.double(), targets

    @torch.enable_grad()
    def _objective(self) -> tuple[float, Tensor]:
        """F and ∇F [weights], over the samples of all ranks."""
        sums = torch.zeros(self._size + 1, dtype=torch.float64, device=self._ranks.device)
        for inputs, targets in self._chunks(CHUNK):
            loss = self._loss(inputs, targets)
            gradients = torch.autograd.grad(loss, list(self._weights.values()))
            sums += torch.cat([*(gradient.view(-1) for gradient in gradients), loss.detach().view(1)])
        if self._ranks.world_size > 1:
            dist.all_reduce(sums)
        means = sums / self._samples
        return means[-1].item(), means[:-1]

    def _variance(self, mean: Tensor) -> float:
        def loss(weights: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
            found: Tensor = functional_call(self._loss, weights, (inputs[None], target[None]))
            return found

        weights = {name: weight.detach() for name, weight in self._weights.items()}
        each = vmap(grad(loss), (None, 0, 0))
        squares = torch.zeros(1, dtype=torch.float64, device=self._ranks.device)
        for inputs, targets in self._chunks(max(1, min(CHUNK, CHUNK_NUMBERS // self._size))):
            gradients = torch.cat([g.flatten(1) for g in each(weights, inputs, targets).values()], dim=1)
            squares += (gradients - mean).square().sum()
        return self._ranks.sum(squares)[0] / (self._samples - 1)
