"""ResNet-18 (He et al. 2016, arXiv 1512.03385) as for CIFAR: a 3 × 3 stem without pooling.

Group normalisation (Wu and He 2018, arXiv 1803.08494) stands where the paper has batch normalisation: that
makes a sample's gradient depend on the other samples of its micro-batch, and then no batch test has a
variance of single samples to estimate.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ClassifierConfig, ConfigError
from pipeline.model._classifier import Classifier

CHANNELS_PER_GROUP = 16


def norm(channels: int) -> nn.GroupNorm:
    """Of groups of 16 channels, or of the next larger number that divides them."""
    most = max(1, channels // CHANNELS_PER_GROUP)
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a 1 × 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = norm(outputs)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(Classifier):
    def __init__(self, channels: int, widths: list[int], outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.stem_norm = norm(widths[0])
        before = [widths[0], *widths[:-1]]
        self.blocks = nn.ModuleList(
            Block(inputs if first else width, width, stride=2 if first and stage > 0 else 1)
            for stage, (inputs, width) in enumerate(zip(before, widths, strict=True))
            for first in (True, False)
        )
        self.head = nn.Linear(widths[-1], outputs)

    @property
    def parts(self) -> list[nn.Module]:
        return [*self.blocks, self.head]

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(inputs)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def build(model: ClassifierConfig, shape: tuple[int, ...], outputs: int) -> ResNet18:
    """Raises ConfigError for samples that are no images [channels, height, width]."""
    if len(shape) != 3:
        raise ConfigError(
            f"model=resnet18: samples of shape {list(shape)} are no images [channels, height, width]. Use "
            f"model=mlp or model=logistic"
        )
    return ResNet18(shape[0], model.widths, outputs)
