"""A linear classifier: with its log loss a convex problem, with `model.l2` a strongly convex one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.config import ClassifierConfig
from pipeline.model._classifier import Classifier


class Logistic(Classifier):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def initial_weight(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """0: a convex problem needs no broken symmetry, and all runs start at the same distance."""
        return torch.zeros(shape)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.flatten(1))


def build(model: ClassifierConfig, shape: tuple[int, ...], outputs: int) -> Logistic:
    return Logistic(math.prod(shape), outputs)
