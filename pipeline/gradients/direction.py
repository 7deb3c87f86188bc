"""Directions to project gradients on. All but the step's own are fixed before the batch is drawn, hence
independent of its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from pipeline.gradients.dtensor import local
from pipeline.gradients.recent import Recent
from pipeline.optim._prox_sgd import ProxSGD


class Direction(Protocol):
    """A direction that the products ⟨g_i, d⟩ are taken with."""

    @property
    def saved(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint must hold of it, by parameter name."""
        ...

    @property
    def known(self) -> bool:
        """Whether there is a direction yet: the same on all ranks."""
        ...

    def parts(self) -> list[torch.Tensor]:
        """d, by parameter: what this rank holds of it."""
        ...

    def step_done(self) -> None:
        """`.grad` of all parameters is that of a measured step."""
        ...


FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # what optimizers call it in their state


class Momentum:
    """The optimizer's first moment. It lies beside the parameters already, and in the checkpoint."""

    saved: Mapping[str, torch.Tensor] = {}

    def __init__(self, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer

    @property
    def known(self) -> bool:
        return bool(self._optimizer.state)

    def parts(self) -> list[torch.Tensor]:
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        return [local(state[name]) for state in states for name in FIRST_MOMENTS if name in state]

    def step_done(self) -> None:
        pass


class InSample:
    """The mean gradient of the measured step itself: known when `.grad` is complete. Or the mean of the last
    ones, where that stands for it."""

    known = True
    saved: Mapping[str, torch.Tensor] = {}

    def __init__(self, parameters: Sequence[torch.Tensor], recent: Recent | None = None) -> None:
        self._parameters, self._recent = parameters, recent

    def parts(self) -> list[torch.Tensor]:
        if self._recent and self._recent.sq_norm is not None:
            return self._recent.mean()
        return [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]

    def step_done(self) -> None:
        pass


class Step:
    """(x − x⁺)/α of the step from x to x⁺ that the mean gradient of the measured step would make at the
    optimizer's rate α: that gradient itself, but for a proximal operator."""

    known = True
    saved: Mapping[str, torch.Tensor] = {}

    def __init__(self, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._gradient, self._optimizer = InSample(parameters), optimizer

    def parts(self) -> list[torch.Tensor]:
        if isinstance(self._optimizer, ProxSGD):
            return self._optimizer.gradient_mapping()
        return self._gradient.parts()

    def step_done(self) -> None:
        pass


class Previous:
    """The mean gradient of the measured step before, zero at first. A copy: 4 bytes per element on a rank."""

    known = True

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = list(parameters.values())
        self.saved = {name: torch.zeros_like(parameter.detach()) for name, parameter in parameters.items()}

    def parts(self) -> list[torch.Tensor]:
        return [local(copy) for copy in self.saved.values()]

    def step_done(self) -> None:
        gradients = [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_copy_(self.parts(), gradients)
