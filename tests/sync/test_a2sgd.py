"""A2SGD, its gradients computed again from a log of everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.sync import method_class
from pipeline.sync._replica import Replica
from pipeline.sync.a2sgd import levels, shifted
from tests.distributed import ranks_of
from tests.support import config
from tests.sync.resume import assert_same_from_step_8, resumed_after_7_steps
from tests.sync.trial import RATE, trial


@pytest.mark.parametrize("ranks", [4, 8])
def test_every_replica_applies_its_residual_and_the_mean_levels(ranks: int):
    logs = trial(ranks, "sync=a2sgd", steps=20, step_s=0.001)
    gradient = np.array([log.gradient for log in logs], dtype=np.float64)  # [ranks, steps, n]
    up = gradient >= 0
    positive = np.where(up, gradient, 0).sum(-1) / np.maximum(up.sum(-1), 1)  # [ranks, steps]
    negative = np.where(up, 0, -gradient).sum(-1) / np.maximum((~up).sum(-1), 1)
    encoded = np.where(up, positive[..., None], -negative[..., None])
    decoded = np.where(up, positive.mean(0)[:, None], -negative.mean(0)[:, None])
    applied = np.array([log.applied for log in logs])
    np.testing.assert_allclose(applied, gradient - encoded + decoded, rtol=1e-5, atol=1e-5)
    after = np.array([log.after for log in logs])
    start = np.stack([log.start for log in logs])
    expected = start[:, None] - RATE * np.cumsum(applied.astype(np.float64), axis=1)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert np.square(after[:, -1] - after[:, -1].mean(0)).sum() > 1  # they drift apart


def test_with_the_same_signs_everywhere_the_mean_gradient_is_that_of_allreduce():
    gradients = torch.randn(4, 1000).abs() * torch.randn(1000).sign()
    of_ranks = torch.stack([levels(gradient) for gradient in gradients])
    mean = of_ranks.mean(0)
    applied = torch.stack(
        [shifted(gradient.clone(), mean - own) for gradient, own in zip(gradients, of_ranks, strict=True)]
    )
    torch.testing.assert_close(applied.mean(0), gradients.mean(0))
    torch.testing.assert_close(shifted(gradients[0].clone(), torch.zeros(2)), gradients[0])  # alone


def test_levels_without_entries_of_a_sign():
    assert levels(torch.tensor([1.0, 3.0, 0.0, 0.0])).tolist() == [1.0, 0.0]
    assert levels(torch.tensor([-1.0, -3.0])).tolist() == [0.0, 2.0]


def test_64_bits_travel():
    composed = config("parallel=ddp", "parallel.replicate=2", "batch.size=64", "sync=a2sgd")
    sent: list[torch.Tensor] = []

    class Alone(Replica):
        def averaged(self, vector: torch.Tensor) -> torch.Tensor:
            sent.append(vector)
            return vector

    replica = Alone(nn.Linear(100, 1), ranks_of(composed))
    method = method_class("a2sgd")(composed, ranks_of(composed), replica)
    replica.set_gradient(torch.randn(101))
    method.before_step(1, RATE)
    method.after_step(1)
    assert [8 * vector.nbytes for vector in sent] == [64]


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(home: Path, small_corpus: list[str]):
    assert_same_from_step_8(*resumed_after_7_steps(home, *small_corpus, "sync=a2sgd"))
