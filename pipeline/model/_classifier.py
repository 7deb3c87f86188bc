"""What models of labelled samples share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.model._interface import Model


class Classifier(Model):
    """inputs [n, …] float32 -> logits [n, outputs]."""

    gathered_whole = False  # for a loss that reads all parameters after the forward pass

    @property
    def layers(self) -> Sequence[nn.Module]:
        return () if self.gathered_whole else self.parts

    @property
    def parts(self) -> Sequence[nn.Module]:
        """`layers`, as far as nobody needs all parameters at once."""
        return ()

    def initial_weight(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Matrices and kernels are normal with variance 2 over the inputs of an output (He et al. 2015,
        eq. 10), so that ReLUs keep the variance; biases are 0, weights of norms 1."""
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        inputs = math.prod(shape[1:])
        return torch.empty(shape).normal_(0.0, math.sqrt(2 / inputs), generator=generator)
