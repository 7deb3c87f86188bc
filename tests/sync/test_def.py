"""Detached error feedback, its models computed again from a log of everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import ConfigError
from pipeline.sync import Method, method_class
from pipeline.sync._replica import Replica
from tests.distributed import column, ranks_of, train_here
from tests.support import config
from tests.sync.resume import SMALL, assert_same_from_step_8, resumed_after_7_steps
from tests.sync.trial import RATE, WEIGHTS, gradient_at, trial

DDP = ("parallel=ddp", "parallel.replicate=4", "batch.size=64", "sync=def")


@pytest.mark.parametrize(
    ("ranks", "share", "detach"), [(4, 0.1, 0.3), (8, 0.25, 1.0), (4, 0.01, 0.0), (4, 1.0, 0.3)]
)
def test_every_replica_is_what_the_algorithm_says(ranks: int, share: float, detach: float):
    steps = 40
    settings = ("optim=sgd", f"sync.block_share={share}", f"sync.detach={detach}")
    logs = trial(ranks, "sync=def", *settings, steps=steps, step_s=0.001)
    model, error = logs[0].start.astype(np.float64), np.zeros((ranks, WEIGHTS))
    for index in range(steps):
        for rank, log in enumerate(logs):
            weights = torch.from_numpy(model - detach * error[rank])
            gradient = gradient_at(weights, rank, index + 1).numpy()
            np.testing.assert_allclose(log.gradient[index], gradient, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(log.own[index], model - RATE * gradient, rtol=1e-4, atol=1e-4)
            error[rank] += RATE * gradient
        first = np.random.default_rng([0, index + 1]).integers(WEIGHTS)
        block = (first + np.arange(round(share * WEIGHTS))) % WEIGHTS
        model[block] -= error[:, block].mean(axis=0)
        error[:, block] = 0
        for log in logs:
            np.testing.assert_allclose(log.after[index], model, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(log.after[index], logs[0].after[index])  # to the bit
    for rank, log in enumerate(logs):
        assert log.state
        np.testing.assert_allclose(log.state[1]["error"], error[rank], rtol=1e-3, atol=1e-4)


def test_with_everything_sent_models_are_averaged_in_every_step():
    settings = ("optim=sgd", "sync.block_share=1", "sync.detach=0")
    logs = trial(4, "sync=def", *settings, steps=10, step_s=0.001)
    local = trial(4, "sync=local_sgd", "sync.period=1", steps=10, step_s=0.001)
    np.testing.assert_allclose(logs[0].after, local[0].after, rtol=1e-5, atol=1e-6)


def test_goes_on_with_what_was_not_sent_yet():
    """Bit for bit."""
    settings = ("sync=def", "optim=sgd", "sync.block_share=0.05", "sync.detach=0.3")
    whole = trial(4, *settings, steps=20, step_s=0.001)
    before = trial(4, *settings, steps=9, step_s=0.001)
    saved = [log.state for log in before if log.state]
    after = trial(4, *settings, steps=11, step_s=0.001, saved=saved, first=10)
    for rank in range(4):
        np.testing.assert_array_equal(after[rank].gradient, whole[rank].gradient[9:])
        np.testing.assert_array_equal(after[rank].after, whole[rank].after[9:])


class Alone(Replica):
    """Its mean is its own; remembers how much was sent."""

    sent: tuple[int, ...] = ()

    def averaged(self, vector: torch.Tensor) -> torch.Tensor:
        self.sent += (len(vector),)
        return vector


def alone(*overrides: str) -> tuple[Alone, Method]:
    composed = config(*DDP, "optim=sgd", *overrides)
    replica = Alone(nn.Linear(200, 1, bias=False), ranks_of(composed))
    return replica, method_class("def")(composed, ranks_of(composed), replica)


def test_only_the_block_travels_and_every_weight_equally_often():
    replica, method = alone("sync.block_share=0.05")
    steps, counts = 4000, np.zeros(200)
    for step in range(1, steps + 1):
        method.before_backward(step)
        method.before_step(step, 0.0)
        replica.set_weights(replica.weights() + 1)  # so that whatever is sent is seen
        method.after_step(step)
        counts += (method.state()["error"] == 0).numpy()
    assert replica.sent == (10,) * steps
    # Binomial: 200 ± 13.8; blocks make neighbours alike, not more extreme.
    assert counts.min() > 130 and counts.max() < 270


def test_a_step_without_a_rate_sends_what_was_left():
    """A step that moves no weight divides by nothing."""
    replica, method = alone("sync.block_share=1", "sync.detach=0.5")
    method.load_state({"error": torch.ones(200)})
    start = replica.weights()
    method.before_backward(1)
    torch.testing.assert_close(replica.weights(), start - 0.5)
    method.before_step(1, 0.0)
    np.testing.assert_array_equal(replica.weights(), start)  # to the bit
    method.after_step(1)
    torch.testing.assert_close(replica.weights(), start - 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=adamw"], "optim=adamw.*Use optim=sgd"),
        (["optim=sgd", "sync.block_share=1.5"], "sync.block_share=1.5.*Nearest sync.block_share: 1"),
        (["optim=sgd", "sync.detach=-0.1"], "sync.detach=-0.1.*Nearest sync.detach: 0"),
        (["optim=sgd", "sync.detach=2"], "sync.detach=2.*Nearest sync.detach: 1"),
        (
            ["optim=sgd", "batch=norm_test", "batch.max_size=128", "batch.estimator=worker"],
            "sync.detach=0.3.*Nearest sync.detach: 0",
        ),
    ],
)
def test_refuses(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        config(*DDP, *overrides)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(home: Path, small_corpus: list[str]):
    settings = ("sync=def", "optim=sgd", "sync.block_share=0.1", "optim.weight_decay=0.01")
    whole, cut = resumed_after_7_steps(home, *small_corpus, *settings)
    assert_same_from_step_8(whole, cut)
    assert column(whole, "sync/consensus") == [0.0] * 20


@pytest.mark.slow
def test_with_everything_sent_it_trains_as_allreduce_does(home: Path, small_corpus: list[str]):
    """Momentum and weight decay are linear, so their mean is that of one model; and batches can be tested."""
    tested = (
        "batch=norm_test",
        "batch.max_size=64",
        "batch.estimator=worker",
        "batch.eta=0.2",
        "batch.hold_tokens=1k",
    )
    common = (*SMALL, *small_corpus, *tested, "optim=sgd", "optim.clip=null", "optim.weight_decay=0.01")
    feedback = train_here(config(*common, "sync=def", "sync.block_share=1", "sync.detach=0"))
    one = train_here(config(*common, "sync=allreduce"))
    assert column(feedback, "batch/size") == column(one, "batch/size") != [8] * 20
    for name in ("train/loss", "stat/variance", "val/loss"):
        assert column(feedback, name) == pytest.approx(column(one, name), rel=1e-3)
