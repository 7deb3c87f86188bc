"""A scorer of samples whose area under the ROC curve is to become large (AUC: the chance that a positive
sample has a higher score than a negative one).

With the surrogate (1 − h(x) + h(x'))² of a pair, a positive x and a negative x', that is a sum over pairs.
Ying, Wen, Lyu 2016 (NeurIPS, Theorem 1) make of it a saddle point over single samples,

    p(1 − p) E[(1 − h(x) + h(x'))²] = p(1 − p) + min over a, b, max over α of E F(h; a, b, α)
    F = (1 − p)(h − a)²[y = 1] + p(h − b)²[y = 0] − p(1 − p)α²
        + 2(1 + α)(p h [y = 0] − (1 − p) h [y = 1])

with p the share of positives; CoDA (Guo et al. 2020, arXiv 2005.02426) trains networks with it. The gradient
of α is reversed on its way back, so that every optimizer that descends in all parameters ascends in α.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.model._interface import Model


class SaddleAUC(Model):
    """inputs [n, …] -> (h, a, b, α) of every sample, [n, 4]; the scores h lie between 0 and 1."""

    def __init__(self, scorer: Model) -> None:
        super().__init__()
        self.scorer = scorer
        self.saddle = nn.Parameter(torch.empty(3))  # a, b, α

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.scorer.layers)

    def initial_weight(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if name == "saddle":
            return torch.zeros(shape)
        return self.scorer.initial_weight(name.removeprefix("scorer."), shape, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        scores = self.scorer(inputs).sigmoid()
        a_and_b, alpha = self.saddle[:2], _ascending(self.saddle[2:])
        return torch.cat((scores, torch.cat((a_and_b, alpha)).expand(len(scores), 3)), dim=1)


def _ascending(value: Tensor) -> Tensor:
    """The value, with the gradient reversed; torch.func takes it, unlike a function with its own backward."""
    return 2 * value.detach() - value


def saddle_loss(outputs: Tensor, labels: Tensor, positives: float) -> Tensor:
    """F of every sample, [n]; `positives`: their share p."""
    h, a, b, alpha = outputs.unbind(1)
    positive, p = labels == 1, positives
    of_positive = (1 - p) * (h - a).square() - 2 * (1 + alpha) * (1 - p) * h
    of_negative = p * (h - b).square() + 2 * (1 + alpha) * p * h
    return torch.where(positive, of_positive, of_negative) - p * (1 - p) * alpha.square()


SCORE_BINS = 1024


def score_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """Samples by score and label, float64 [2 · SCORE_BINS]; `auc` follows from the sum over ranks and
    batches."""
    bins = (scores * SCORE_BINS).long().clamp(0, SCORE_BINS - 1) + SCORE_BINS * labels
    return torch.bincount(bins, minlength=2 * SCORE_BINS).double()


def auc(counts: Tensor) -> float:
    """The area under the ROC curve; scores in one bin count as equal, a pair of them one half. NaN without
    positives or without negatives."""
    negative, positive = counts.view(2, SCORE_BINS)
    below = negative.cumsum(0) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))
