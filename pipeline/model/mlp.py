"""Fully connected layers with ReLUs between them; `model.widths` are those of the hidden ones."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ClassifierConfig
from pipeline.model._classifier import Classifier


class MLP(Classifier):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    @property
    def parts(self) -> list[nn.Module]:
        return list(self.linears)

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs.flatten(1)
        for linear in self.linears[:-1]:
            x = F.relu(linear(x))
        return self.linears[-1](x)


def build(model: ClassifierConfig, shape: tuple[int, ...], outputs: int) -> MLP:
    return MLP([math.prod(shape), *model.widths, outputs])
