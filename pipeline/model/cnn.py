"""Two convolutions, each halving the image, and a linear layer: the three-layer network of AdAdaGrad's MNIST
experiment (Lau et al. 2024, arXiv 2402.11215). `model.widths` are the channels of the convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ClassifierConfig, ConfigError
from pipeline.model._classifier import Classifier


class CNN(Classifier):
    def __init__(self, channels: int, widths: list[int], pixels: int, outputs: int) -> None:
        super().__init__()
        first, second = widths
        self.first = nn.Conv2d(channels, first, kernel_size=3, padding=1)
        self.second = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.head = nn.Linear(second * pixels, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(inputs)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(x.flatten(1))


def build(model: ClassifierConfig, shape: tuple[int, ...], outputs: int) -> CNN:
    """Raises ConfigError for samples that are no images [channels, height, width]."""
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ConfigError(
            f"model={model.kind}: samples of shape {list(shape)} are no images [channels, height, width] of "
            f"at least 4 × 4 pixels. Use model=mlp or model=logistic"
        )
    channels, height, width = shape
    return CNN(channels, model.widths, (height // 4) * (width // 4), outputs)
