"""Classifiers in the training loop: against loops written by hand, on several ranks, interrupted, and what a user is
told of them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import pipeline.data.__main__
import pipeline.export
import pipeline.model as models
import pipeline.train
from pipeline import checkpoint, registry, samples, worker
from pipeline.config import ClassifierConfig, Config, ConfigError
from pipeline.data import permute
from pipeline.model.init import initialise
from pipeline.problem import check_samples, problem_of
from pipeline.store import RunDirectory
from tests.distributed import column, gloo_ranks, ranks_of, train_here, train_rank
from tests.support import config

# Steps of 32 samples at a constant rate, the last one of 24; 600 samples are less than half an epoch of digits.
SMALL = [
    "data=digits", "budget.tokens=600", "batch.size=32", "data.micro_batch=8", "optim=sgd", "optim.lr=0.1",
    "optim.clip=null", "lr.warmup_tokens=0", "lr.min_ratio=1", "eval.sequences=100",
]  # fmt: skip


def arrays(composed: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that a run trains on, in its order, and the held-out samples that it is evaluated on."""
    split = samples.read(composed.data)

    def at(indices: NDArray[np.int64], seed: int, count: int) -> tuple[Tensor, Tensor]:
        places, n = np.arange(count), len(indices)
        order = indices[permute(places % n, n, seed, places // n)]
        inputs, labels = split.train.at(order)
        return torch.from_numpy(inputs), torch.from_numpy(labels)

    evaluated = min(composed.eval.sequences, len(split.validation_indices))
    return (
        *at(split.train_indices, composed.data.seed, composed.budget_sequences),
        *at(split.validation_indices, 0, evaluated),
    )


# --- one process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "loss"),
    [("digits", "cross_entropy"), ("breast_cancer", "binary"), ("breast_cancer", "cross_entropy")],
)
def test_logistic_regression_equals_a_loop_written_by_hand(data: str, loss: str, home: Path):
    """Whole batches, torch's SGD with momentum, the penalty of every sample; breast_cancer for more than an epoch."""
    composed = config(*SMALL, f"data={data}", "model=logistic", f"model.loss={loss}", "model.l2=0.3")
    run = train_here(composed)
    inputs, labels, held_out, held_out_labels = arrays(composed)
    outputs = 1 if loss == "binary" else int(labels.max()) + 1
    linear = nn.Linear(inputs[0].numel(), outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)

    def own_loss(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = linear(inputs.flatten(1))
        if loss == "binary":
            return torch.log1p(torch.exp(-(2 * labels - 1) * logits[:, 0])).mean()
        return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()

    losses, norms = [], []
    for start in range(0, 600, 32):
        penalty = 0.3 / 2 * (linear.weight.square().sum() + linear.bias.square().sum())
        step_loss = own_loss(inputs[start : start + 32], labels[start : start + 32]) + penalty
        optimizer.zero_grad()
        step_loss.backward()
        losses.append(step_loss.item())
        norms.append(math.hypot(linear.weight.grad.norm(), linear.bias.grad.norm()))
        optimizer.step()
    assert column(run, "train/loss") == pytest.approx(losses, rel=1e-5)
    assert column(run, "grad/norm") == pytest.approx(norms, rel=1e-5)
    assert column(run, "batch/size") == [32] * 18 + [24] and column(run, "tokens")[-1] == 600
    weights = checkpoint.load_weights(run)
    torch.testing.assert_close(weights["linear.weight"], linear.weight.detach(), rtol=1e-4, atol=1e-6)

    with torch.no_grad():
        logits = linear(held_out.flatten(1))
        guessed = (logits[:, 0] > 0).long() if loss == "binary" else logits.argmax(1)
        assert column(run, "val/loss") == pytest.approx(
            [own_loss(held_out, held_out_labels).item()], rel=1e-5
        )
        assert column(run, "val/accuracy") == [
            pytest.approx((guessed == held_out_labels).double().mean().item())
        ]
    assert column(run, "val/accuracy")[0] > 0.6


def test_a_convolutional_network_is_trained_by_its_own_gradient(home: Path):
    """With the model itself and torch.optim, on whole batches; evaluated twice on the way."""
    composed = config(
        *SMALL, "model=cnn", "model.widths=[4,8]", "budget.tokens=320", "eval.interval_tokens=100"
    )
    run = train_here(composed)
    inputs, labels, held_out, held_out_labels = arrays(composed)
    assert isinstance(composed.model, ClassifierConfig)
    model = registry.load(models, "cnn").build(composed.model, (1, 8, 8), 10)
    initialise(model, composed.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, evaluated = [], []
    for start in range(0, 320, 32):
        step_loss = F.cross_entropy(model(inputs[start : start + 32]), labels[start : start + 32])
        optimizer.zero_grad()
        step_loss.backward()
        losses.append(step_loss.item())
        optimizer.step()
        if start + 32 in (128, 224, 320):
            evaluated.append(F.cross_entropy(model(held_out), held_out_labels).item())
    assert column(run, "train/loss") == pytest.approx(losses, rel=1e-4)
    assert column(run, "val/loss") == pytest.approx(evaluated, rel=1e-4)


def test_the_norm_tests_statistics_are_those_of_the_gradients(home: Path):
    """At weights 0 the softmax is uniform, so the gradients of the four micro-batches follow with numpy alone."""
    adaptive = ["batch=norm_test", "batch.size=32", "batch.max_size=64"]
    composed = config(*SMALL, "model=logistic", *adaptive)
    run = train_here(composed)
    inputs, labels, *_ = (array.numpy().astype(float) for array in arrays(composed))
    wrong = 0.1 - np.eye(10)[labels[:32].astype(int)]  # the loss's gradient in the logits
    of_sample = np.concatenate(
        [(wrong[:, :, None] * inputs[:32].reshape(32, 1, -1)).reshape(32, -1), wrong], axis=1
    )
    units = of_sample.reshape(4, 8, -1).mean(1)
    variance = 8 * ((units - units.mean(0)) ** 2).sum() / 3
    assert column(run, "stat/variance")[0] == pytest.approx(variance, rel=1e-5)
    assert column(run, "stat/mean_sq_norm")[0] == pytest.approx((units.mean(0) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4, 32])
def test_the_micro_batch_changes_nothing_but_rounding(micro_batch: int, home: Path):
    base = train_here(config(*SMALL, "model=mlp", "budget.tokens=160"))
    other = train_here(config(*SMALL, "model=mlp", "budget.tokens=160", f"data.micro_batch={micro_batch}"))
    assert column(other, "train/loss") == pytest.approx(column(base, "train/loss"), rel=1e-5)


# --- several ranks ---------------------------------------------------------------------------------------------

GROWING = [
    "batch=norm_test",
    "batch.size=32",
    "batch.max_size=64",
    "batch.round_to=16",
    "batch.ema=0",
    "batch.eta=0.3",
]
MESHES = (["parallel=ddp", "parallel.replicate=2"], ["parallel=fsdp", "parallel.shard=2"])
MODELS = (
    ["model=logistic"],
    ["model=mlp", "model.widths=[16]", "model.l2=0.1"],
    ["model=cnn", "model.widths=[4,8]"],
    ["model=resnet18", "model.widths=[4,8,8,16]", "budget.tokens=120", "model.l2=0.01"],
)


def train_each(rank: int, runs: list[tuple[Config, str]]) -> None:
    """One after the other in one process group: to start the ranks takes longer than to train."""
    for composed, path in runs:
        train_rank(rank, composed, path)


def train_all(composed: list[Config]) -> list[RunDirectory]:
    """On two ranks."""
    runs = [RunDirectory.of(one) for one in composed]
    for one, run in zip(composed, runs, strict=True):
        run.freeze(one)
    gloo_ranks(2, train_each, [(one, str(run.path)) for one, run in zip(composed, runs, strict=True)])
    return runs


@pytest.mark.slow
def test_every_mesh_trains_and_measures_alike(home: Path):
    """Losses, norms, statistics and decisions; with a penalty too, whose parameters are sharded between the passes."""
    requests = [[*SMALL, *GROWING, "budget.tokens=200", *model] for model in MODELS]
    others = train_all([config(*request, *mesh) for request in requests for mesh in MESHES])
    for request, of_meshes in zip(requests, batched(others, len(MESHES)), strict=True):
        one = train_here(config(*request))
        assert len(set(column(one, "batch/size"))) > 1
        expected = checkpoint.load_weights(one)
        for other in of_meshes:
            assert column(other, "batch/size") == column(one, "batch/size")
            for name in (
                "train/loss",
                "grad/norm",
                "stat/variance",
                "stat/mean_sq_norm",
                "val/loss",
                "val/accuracy",
            ):
                assert column(other, name) == pytest.approx(column(one, name), rel=2e-5), name
            for name, tensor in checkpoint.load_weights(other).items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def batched(runs: list[RunDirectory], size: int) -> list[list[RunDirectory]]:
    return [runs[start : start + size] for start in range(0, len(runs), size)]


def test_ranks_read_different_samples_of_one_order(home: Path):
    """Unit i of a step is the same samples on any number of ranks; by_rank gives each rank a part of its own."""
    composed = config(*SMALL, "model=logistic", "parallel=ddp", "parallel.replicate=4")
    whole = problem_of(composed, ranks_of(composed)).train.read(0, 64)
    for rank in range(4):
        for got, expected in zip(
            problem_of(composed, ranks_of(composed, rank)).train.read(0, 64), whole, strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    divided = config(
        *SMALL, "model=logistic", "parallel=ddp", "parallel.replicate=4", "data.distribution=by_rank"
    )
    streams = [problem_of(divided, ranks_of(divided, rank)).train for rank in range(4)]
    images = [image.tobytes() for own in streams for image in own.read(0, own.sequences_per_epoch)[0]]
    split = samples.read(divided.data)
    expected_images = [image.tobytes() for image in split.train.at(split.train_indices)[0]]
    assert sorted(images) == sorted(expected_images)


# --- interrupted -----------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted(home: Path):
    composed = config(*SMALL, *GROWING, "model=mlp", "model.l2=0.01", "checkpoint.interval_tokens=150",
                      "eval.interval_tokens=200")  # fmt: skip
    whole = train_here(composed)
    whole = RunDirectory(whole.path.rename(home / "whole"))

    class Stopped(Exception):
        pass

    class Stopping(pipeline.train.Trainer):
        def step(self) -> None:
            if self.progress.sequences > 350:
                raise Stopped
            super().step()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pipeline.train, "Trainer", Stopping)
        train_here(composed)
    run = train_here(composed, attempt=2)
    assert {row["attempt"] for row in run.rows()} == {1, 2}
    for name in (
        "tokens",
        "train/loss",
        "grad/norm",
        "batch/size",
        "stat/variance",
        "val/loss",
        "val/accuracy",
    ):
        assert column(run, name) == column(whole, name), name
    expected = checkpoint.load_weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.load_weights(run).items())


# --- precision and compilation ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_trains_to_nearly_the_same_loss(home: Path):
    request = [*SMALL, "model=cnn", "budget.tokens=320"]
    exact = train_here(config(*request))
    rounded = [config(*request, "parallel.precision=bfloat16", *mesh) for mesh in ([], *MESHES)]
    for run in (train_here(rounded[0]), *train_all(rounded[1:])):
        assert column(run, "train/loss") != column(exact, "train/loss")
        assert column(run, "train/loss") == pytest.approx(column(exact, "train/loss"), rel=0.03)
        assert checkpoint.load_weights(run)["head.weight"].dtype == torch.float32


@pytest.mark.slow
def test_compiled_it_trains_alike(home: Path):
    plain, compiled = (
        train_here(config(*SMALL, "model=mlp", "budget.tokens=96", f"parallel.compile={flag}"))
        for flag in ("false", "true")
    )
    assert column(compiled, "train/loss") == pytest.approx(column(plain, "train/loss"), rel=1e-5)


# --- what a user is told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=logistic", "model.loss=binary"],
         r"model\.loss=binary: is of two classes, and data=digits has 10\. Use model\.loss=cross_entropy"),
        (["model=cnn", "data=breast_cancer"], r"model=cnn: samples of shape \[30\] are no images .*Use model=mlp"),
        (["model=logistic", "data=synthetic_logistic", "data.samples=4", "data.distribution=by_rank", "parallel=ddp",
          "parallel.replicate=4"], r"data\.distribution=by_rank: 3 samples to train on, for 4 ranks\. Use .*shared"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_ranks_start(overrides: list[str], message: str, home: Path):
    with pytest.raises(ConfigError, match=message):
        check_samples(config(*SMALL, *overrides))


def test_a_bad_file_is_named_once_and_without_a_traceback(home: Path):
    (home / "file").write_text("1 1:1\n-1 2:x\n")
    request = [
        "model=logistic",
        "data=libsvm",
        f"data.files=[{home}/file]",
        "budget.tokens=100",
        "lr.warmup_tokens=0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *request], capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said
    assert said.count(f"FAILED: {home}/file, line 2: the value of 2:x is no finite number") == 1


def test_a_finished_run_speaks_of_samples_and_cannot_be_exported(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    run = train_here(config(*SMALL, "model=logistic"))
    said = worker._conclusion(run)
    row = run.rows()[-1]
    assert re.match(r"19 steps, 600 samples in \d+ s of training, validation loss ", said)
    assert f"loss {row['val/loss']:.4f}, accuracy {row['val/accuracy']:.4f}\n" in said
    assert "export" not in said and "token" not in said
    assert pipeline.export.main([run.id, str(home / "exported")]) == 2
    message = capsys.readouterr().err
    assert f"run {run.id} is of model=logistic, of which transformers has no form" in message
    assert "load_weights" in message
    assert not (home / "exported").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["data=digits"], 0, "1,438 samples of 1 × 8 × 8 to train on, 359 held out, 10 classes"),
        (
            ["data=synthetic_logistic", "data.samples=100"],
            0,
            "80 samples of 50 to train on, 20 held out, 2 classes",
        ),
        (["data=libsvm"], 2, "data.files=[]: data=libsvm needs one file, or two"),
        (["data=idx", "data.files=[/nowhere]"], 2, "data=idx: no file /nowhere/train-images-idx3-ubyte"),
    ],
)
def test_data_are_described(
    arguments: list[str],
    code: int,
    said: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["pipeline.data", *arguments])
    assert pipeline.data.__main__.main() == code
    output = capsys.readouterr()
    assert (output.err if code else output.out).startswith(said)
