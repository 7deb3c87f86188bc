"""Proximal stochastic gradient as a torch optimizer; apart from prox_sgd.py, which must not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.gradients.dtensor import local
from pipeline.optim._proximal import Proximal
from pipeline.optim._uncompiled import Uncompiled


class ProxSGD(Uncompiled):
    def __init__(self, parameters: Iterable[Tensor], lr: float, proximal: Proximal) -> None:
        super().__init__(parameters, {"lr": lr})
        self.proximal = proximal

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, gradient, rate in self._steps():
            weight = local(parameter)
            weight.sub_(gradient, alpha=rate)
            if parameter.dim() > 1:
                weight.copy_(self.proximal(weight, rate))

    @torch.no_grad()
    def gradient_mapping(self) -> list[Tensor]:
        """(w − w⁺)/lr of the step to w⁺ that would be taken now: what this rank holds of it."""
        parts = []
        for parameter, gradient, rate in self._steps():
            if parameter.dim() > 1:
                weight = local(parameter.detach())
                gradient = (weight - self.proximal(weight - rate * gradient, rate)) / rate
            parts.append(gradient)
        return parts

    def _steps(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Each parameter that has a gradient, what this rank holds of that, and its rate. None at rate 0,
        torch's way to have an optimizer make its state: to project the weights of a checkpoint once more
        would change their last bits."""
        for group in (group for group in self.param_groups if group["lr"]):
            yield from ((p, local(p.grad), group["lr"]) for p in group["params"] if p.grad is not None)
