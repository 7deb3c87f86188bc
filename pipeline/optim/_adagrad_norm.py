"""AdaGrad-Norm as torch optimizers; apart from adagrad_norm.py, which must not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.gradients.dtensor import local, row_sums
from pipeline.optim._evaluation import Evaluating, Evaluation
from pipeline.optim._uncompiled import Uncompiled


class AdaGradNorm(Evaluating):
    """One sum for all parameters; each keeps a copy of it, as a state that every mesh can read."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, accumulator: float, delayed: bool) -> None:
        super().__init__(parameters, {"lr": lr, "delayed": delayed})
        for parameter in self.parameters():
            self.state[parameter]["sum"] = torch.tensor(accumulator)

    @torch.no_grad()
    def step(self, closure: Evaluation | None = None) -> None:
        assert closure
        (group,) = self.param_groups
        sums = [self.state[parameter]["sum"] for parameter in self.parameters()]
        before = sums[0].item()
        torch._foreach_add_(sums, closure.squared_norm)
        rate = group["lr"] / math.sqrt(before if group["delayed"] else sums[0].item())
        torch._foreach_add_(self.weights(), self.gradients(), alpha=-rate)


class RowAdaGradNorm(Uncompiled):
    """A sum for each row of a matrix (of a kernel: each output channel), and for each element of a vector."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, accumulator: float, delayed: bool) -> None:
        super().__init__(parameters, {"lr": lr, "delayed": delayed})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["sum"] = torch.full_like(row_sums(parameter.detach()), accumulator)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        for parameter in group["params"]:
            total, gradient = self.state[parameter]["sum"], parameter.grad
            before = total.clone()
            total += row_sums(gradient.square())
            divisor = local(before if group["delayed"] else total).sqrt()
            local(parameter).addcdiv_(local(gradient), divisor, value=-group["lr"])
