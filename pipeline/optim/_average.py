"""The mean of iterates that optim=swa keeps beside the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.config import Config


class Average:
    """w̄ ← (n w̄ + w)/(n + 1) after steps that pass a multiple of `optim.average_interval_tokens`, counted from
    `optim.average_start` of the planned budget on.

    With `optim.average_restart_tokens` the run goes on from w̄ after so many tokens, with an optimizer that
    remembers nothing, and the next mean begins with the next iterate: the periodic form of Guo, Jin, Liu
    2022 (arXiv 2201.00519), as in their code, which helps while the iterates have not converged. The last
    mean is left for the evaluation.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: Config) -> None:
        """`parameters` by their names in a checkpoint."""
        self._weights = list(parameters.values())
        self._means = [torch.zeros_like(weight.detach()) for weight in self._weights]
        self.saved = {f"average.{name}": mean for name, mean in zip(parameters, self._means, strict=True)}
        optim = config.optim
        self._start = round(optim.average_start * config.planned_tokens)
        self._interval, self._restart = optim.average_interval_tokens, optim.average_restart_tokens
        self._end = config.budget_tokens

    @torch.no_grad()
    def observe(self, before: int, after: int, count: int) -> int:
        """A step led from `before` tokens to `after`. `count` iterates were in the mean: how many are now."""
        if not self._passed(before, after, self._interval or 1):
            return count
        for mean, weight in zip(self._means, self._weights, strict=True):
            mean.lerp_(weight, 1 / (count + 1))
        return count + 1

    def restarts(self, before: int, after: int) -> bool:
        """Whether the step after which a mean begins anew, if there is one, led from `before` to `after`."""
        return self._restart is not None and after < self._end and self._passed(before, after, self._restart)

    @torch.no_grad()
    def go_on_from_mean(self, optimizer: Optimizer, new: Optimizer) -> None:
        """With the state of a new optimizer. What that makes in its first step begins as 0; it is kept, since
        a checkpoint is read into a state that has it."""
        for mean, weight in zip(self._means, self._weights, strict=True):
            weight.copy_(mean)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if name in new.state[parameter]:
                    value.copy_(new.state[parameter][name])
                else:
                    value.zero_()

    def _passed(self, before: int, after: int, tokens: int) -> bool:
        """A multiple of `tokens` above 0, counted from the start."""
        since = [max(0, at - self._start) // tokens for at in (before, after)]
        return since[1] > since[0]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs the weights are the mean; a copy of one parameter at a time."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, weight in zip(self._means, self._weights, strict=True):
            held = weight.clone()
            weight.copy_(mean)
            mean.copy_(held)
