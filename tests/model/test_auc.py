"""The saddle point of the AUC loss against the pairwise loss that it stands for, and the AUC against scipy's ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from pipeline.losses import AUC
from pipeline.model._auc import SaddleAUC, auc, saddle_loss, score_counts
from pipeline.model.logistic import Logistic


def scored(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [n] between 0 and 1 that tell the labels [n] apart somewhat; 30 % are positive."""
    random = np.random.default_rng(seed)
    labels = (random.random(400) < 0.3).astype(np.int64)
    scores = 1 / (1 + np.exp(-random.normal(labels, 1.0)))
    return torch.tensor(scores), torch.tensor(labels)


def pairwise(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positive, negative = scores[labels == 1], scores[labels == 0]
    return (1 - positive[:, None] + negative).square().mean()


def saddle_value(
    scores: torch.Tensor, labels: torch.Tensor, a: float, b: float, alpha: float
) -> torch.Tensor:
    saddle = torch.tensor([a, b, alpha], dtype=torch.float64).expand(len(scores), 3)
    return saddle_loss(torch.cat((scores[:, None], saddle), 1), labels, float(labels.double().mean())).mean()


def test_the_saddle_is_the_pairwise_loss():
    scores, labels = scored()
    p = float(labels.double().mean())
    a, b = float(scores[labels == 1].mean()), float(scores[labels == 0].mean())
    expected = p * (1 - p) * (pairwise(scores, labels) - 1)
    assert saddle_value(scores, labels, a, b, b - a).item() == pytest.approx(expected.item(), rel=1e-9)
    # A minimum in a and b, a maximum in α.
    for change in (-0.01, 0.01):
        assert saddle_value(scores, labels, a + change, b, b - a) > expected
        assert saddle_value(scores, labels, a, b + change, b - a) > expected
        assert saddle_value(scores, labels, a, b, b - a + change) < expected


def test_descent_in_all_parameters_is_ascent_in_alpha():
    torch.manual_seed(0)
    model = SaddleAUC(Logistic(5, 1))
    inputs, labels = torch.randn(40, 5), torch.arange(40) % 2
    torch.nn.init.normal_(model.scorer.linear.weight)
    torch.nn.init.zeros_(model.scorer.linear.bias)
    model.saddle.data = torch.tensor([0.3, 0.2, 0.1])
    AUC(0.5).of(model(inputs), labels).sum().backward()
    reversed_alpha = model.saddle.grad.clone()

    def value(saddle: torch.Tensor) -> torch.Tensor:
        scores = model.scorer(inputs).sigmoid()
        return saddle_loss(torch.cat((scores, saddle.expand(40, 3)), 1), labels, 0.5).sum()

    expected = torch.autograd.functional.jacobian(value, model.saddle.data)
    torch.testing.assert_close(reversed_alpha, expected * torch.tensor([1.0, 1.0, -1.0]))


def test_descent_on_the_pairwise_loss_has_the_gradient_of_the_saddle():
    """At the saddle's own a, b and α, by the envelope theorem."""
    scores, labels = scored()
    scores.requires_grad_()
    p = float(labels.double().mean())
    (p * (1 - p) * pairwise(scores, labels)).backward()
    expected = scores.grad.clone()
    scores.grad = None
    with torch.no_grad():
        a, b = float(scores[labels == 1].mean()), float(scores[labels == 0].mean())
    saddle_value(scores, labels, a, b, b - a).backward()
    torch.testing.assert_close(scores.grad, expected)


def test_auc_of_counts_is_that_of_ranks():
    scores, labels = scored()
    positive, negative = scores[labels == 1].numpy(), scores[labels == 0].numpy()
    expected = mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    halves = score_counts(scores[:150], labels[:150]) + score_counts(scores[150:], labels[150:])
    assert auc(halves) == pytest.approx(expected, abs=1e-3)
    assert auc(score_counts(torch.tensor([0.9, 0.9]), torch.tensor([0, 1]))) == 0.5
    assert np.isnan(auc(score_counts(torch.tensor([0.9]), torch.tensor([1]))))
