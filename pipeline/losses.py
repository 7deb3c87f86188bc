"""The losses of labelled samples, by `model.loss`, and what an evaluation tells of them.

An evaluation adds up numbers over micro-batches and ranks; `metrics` makes of the sums what is logged.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model._auc import SCORE_BINS, SaddleAUC, auc, saddle_loss, score_counts
from pipeline.model._interface import Model


class Loss(Protocol):
    """What is minimised of labelled samples, and what an evaluation shows."""

    outputs: int  # of the model, for each sample
    sums: int  # numbers that an evaluation adds up

    def of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, [n], from [n, outputs]."""
        ...

    def evaluated(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Of these samples, what is added up: float64 [sums]."""
        ...

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        """By name."""
        ...

    def completed(self, model: Model) -> Model:
        """The model with whatever parameters the loss has of its own."""
        ...


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


class _Accuracy:
    """Losses that come with a guess of the label."""

    sums = 2

    def of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def guessed(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def evaluated(self, outputs: Tensor, labels: Tensor) -> Tensor:
        right = (self.guessed(outputs) == labels).sum()
        return torch.stack([self.of(outputs, labels).sum().double(), right.double()])

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        loss, right = (sums / samples).tolist()
        return {"val/loss": loss, "val/accuracy": right}

    def completed(self, model: Model) -> Model:
        return model


class CrossEntropy(_Accuracy):
    """−log of the softmax at the label, in nats."""

    def __init__(self, classes: int) -> None:
        self.outputs = classes

    def of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_at_least_float32(outputs), labels, reduction="none")

    def guessed(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)


class Binary(_Accuracy):
    """log(1 + exp(−y h)) of one output h and the label y = ±1."""

    outputs, sums = 1, _Accuracy.sums + 2 * SCORE_BINS

    def of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        output = _at_least_float32(outputs[:, 0])
        # The threshold, above which it is the identity, at 40: at its 20, float64 would tell.
        return F.softplus(torch.where(labels == 1, -output, output), threshold=40)

    def guessed(self, outputs: Tensor) -> Tensor:
        return (outputs[:, 0] > 0).long()

    def evaluated(self, outputs: Tensor, labels: Tensor) -> Tensor:
        scores = _at_least_float32(outputs[:, 0]).sigmoid()
        return torch.cat((super().evaluated(outputs, labels), score_counts(scores, labels)))

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        accuracy = _Accuracy.sums
        return {**super().metrics(sums[:accuracy], samples), "val/auc": auc(sums[accuracy:])}


class AUC:
    """The saddle point of pipeline.model._auc; `positives`: share of label 1 among the samples that are
    trained on."""

    outputs, sums = 1, 1 + 2 * SCORE_BINS

    def __init__(self, positives: float) -> None:
        self._positives = positives

    def of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return saddle_loss(_at_least_float32(outputs), labels, self._positives)

    def evaluated(self, outputs: Tensor, labels: Tensor) -> Tensor:
        loss = self.of(outputs, labels).sum().double()
        return torch.cat((loss.view(1), score_counts(outputs[:, 0], labels)))

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        return {"val/loss": float(sums[0] / samples), "val/auc": auc(sums[1:])}

    def completed(self, model: Model) -> Model:
        return SaddleAUC(model)
