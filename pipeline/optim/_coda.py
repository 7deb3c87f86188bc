"""CoDA as a torch optimizer; apart from coda.py, which must not import torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import OptimConfig
from pipeline.optim._evaluation import Evaluating, Evaluation


class CoDA(Evaluating):
    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        super().__init__(model.parameters(), {"lr": config.lr})
        # Names have prefixes where the model is wrapped.
        named = model.named_parameters()
        (self._saddle,) = (weight for name, weight in named if name.split(".")[-1] == "saddle")
        self._first_tokens, self._growth = config.stage_tokens, config.stage_growth
        self._proximity = config.proximity

    def stage(self, tokens: int) -> int:
        """In which a step is that begins after so many tokens, from 0."""
        stage, end = 0, float(self._first_tokens)
        while tokens >= end:
            stage += 1
            end += self._first_tokens * self._growth**stage
        return stage

    @torch.no_grad()
    def step(self, closure: Evaluation | None = None) -> None:
        stage = self.stage(closure.first) if closure else 0
        (group,) = self.param_groups
        group["lr"] *= self._growth**-stage
        for weight in group["params"]:
            self._move(weight, group["lr"])
        if closure and self.stage(closure.first + closure.samples) > stage:
            self._end_stage(closure)

    def _move(self, weight: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["iterates"] = torch.zeros(())
            state["mean"], state["reference"] = torch.zeros_like(weight), weight.clone()
        pull = (weight - state["reference"]) / self._proximity
        if weight is self._saddle:
            pull[2] = 0  # of a, b, α
        weight.sub_(weight.grad + pull, alpha=rate)
        state["iterates"] += 1
        state["mean"].lerp_(weight, 1 / state["iterates"].item())

    def _end_stage(self, closure: Evaluation) -> None:
        for weight in self.parameters():
            weight.copy_(self.state[weight]["mean"])
        closure.average_replicas()
        for weight in self.parameters():
            state = self.state[weight]
            state["reference"].copy_(weight)
            state["iterates"].zero_()
            state["mean"].zero_()
