"""Signum as a torch optimizer; apart from signum.py, which must not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pipeline.optim._uncompiled import Uncompiled


class Signum(Uncompiled):
    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            averages = [self.state[parameter]["exp_avg"] for parameter in moved]
            torch._foreach_lerp_(averages, [p.grad for p in moved], 1 - group["momentum"])
            torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(moved, torch._foreach_sign(averages), alpha=-group["lr"])
