"""Directions to project gradients on: fixed before the batch is drawn, hence independent of its noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pipeline.gradients.dtensor import local


class Direction(Protocol):
    @property
    def known(self) -> bool:
        """Not before the first step."""
        ...

    def parts(self) -> list[torch.Tensor]:
        """d, by parameter: what this rank holds of it."""
        ...

    def step_done(self) -> None:
        """`.grad` of all parameters is that of a measured step."""
        ...


class Momentum:
    """The optimizer's first moment. No memory of its own: it lies beside the parameters already."""

    def __init__(self, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._state = parameters, optimizer.state

    @property
    def known(self) -> bool:
        return bool(self._state)

    def parts(self) -> list[torch.Tensor]:
        return [local(self._state[parameter]["exp_avg"]) for parameter in self._parameters]

    def step_done(self) -> None:
        pass


class Previous:
    """The mean gradient of the measured step before. A copy of it: 4 bytes per element on this rank."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._copies: list[torch.Tensor] = []

    @property
    def known(self) -> bool:
        return bool(self._copies)

    def parts(self) -> list[torch.Tensor]:
        return self._copies

    def step_done(self) -> None:
        gradients = [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        if not self._copies:
            self._copies = [torch.empty_like(gradient) for gradient in gradients]
        torch._foreach_copy_(self._copies, gradients)
