"""Proximal stochastic gradient as a torch optimizer; apart from prox_sgd.py, which must not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.gradients.dtensor import local
from pipeline.optim._proximal import Proximal


class ProxSGD(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[Tensor], lr: float, proximal: Proximal) -> None:
        super().__init__(parameters, {"lr": lr})
        self.proximal = proximal

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            rate = group["lr"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                weight = local(parameter)
                weight.sub_(local(parameter.grad), alpha=rate)
                if parameter.dim() > 1:
                    weight.copy_(self.proximal(weight, rate))
