"""What the capture of single samples sees, against their gradients from torch.func on a float64 copy."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pipeline.gradients.layers
import pipeline.gradients.sample
from pipeline.batch._interface import Needs
from pipeline.config import Config
from pipeline.gradients.capture import capture_for
from pipeline.gradients.layers import layers_of
from pipeline.gradients.sample import SampleCapture
from pipeline.gradients.statistics import BINS_PER_OCTAVE, LOWEST_OCTAVE, GradientStatistics
from pipeline.parallel import strategy_class
from pipeline.problem import problem_of
from tests.distributed import column, gloo_ranks, ranks_of, train_here
from tests.meshes import MESHES
from tests.support import config

# 14 samples in micro-batches of 3, the last one short, and on two ranks the second has no share in the last round
MICRO, SAMPLES = 3, 14
COUNTS = [3, 3, 3, 3, 2]

PROBLEMS = {
    "binary": ["model=logistic", "model.loss=binary", "data=breast_cancer", "data.standardise=true"],
    "multiclass": ["model=logistic", "data=digits", "model.l2=0.1"],
    "mlp": ["model=mlp", "model.widths=[9,7]", "data=digits", "model.l2=0.01"],
    "cnn": ["model=cnn", "model.widths=[3,5]", "data=digits", "model.l2=0.02"],
    "resnet18": ["model=resnet18", "model.widths=[4,4,6,8]", "data=digits"],
}
STEP = ["data.micro_batch=3", "batch.size=6"]
IN_SAMPLE = Needs("sample", direction="in_sample")
PREVIOUS = Needs("sample", direction="previous")
COORDINATES = Needs("sample", coordinates=True)


class Trial:
    """A model with weights that are no special point, and the steps that a test takes with it."""

    def __init__(self, composed: Config, rank: int = 0) -> None:
        self.ranks = ranks_of(composed, rank)
        self.problem = problem_of(composed, self.ranks)
        self.strategy = strategy_class(composed.parallel.strategy)(composed, self.ranks)
        self.model = self.strategy.apply(self.problem.model())
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.device)

    def samples(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        return self.problem.tensors(self.problem.train.read(first, count), self.ranks.device)

    def step(self, capture: SampleCapture, first: int = 0) -> GradientStatistics:
        """One measured step over SAMPLES samples; their mean gradient is left in `.grad`."""
        self.model.zero_grad()
        capture.start_step(COUNTS)
        rounds = -(-len(COUNTS) // self.ranks.data_ranks)
        for index in range(rounds):
            unit = index * self.ranks.data_ranks + self.ranks.data_rank
            count = COUNTS[unit] if unit < len(COUNTS) else 0
            inputs, targets = self.samples(first + unit * MICRO if count else 0, max(count, 1))
            with self.strategy.micro_batch(self.model, last=index + 1 == rounds, whole=False):
                mean = self.problem.loss(self.model, inputs, targets) / len(targets)
                with capture.unit(unit):
                    (mean * self.ranks.loss_scale(count, of=SAMPLES)).backward()
        mean_sq_norm = sum(float(p.grad.double().square().sum()) for p in self.model.parameters())
        return capture.statistics(self.ranks.sum(capture.sums()), mean_sq_norm)

    def truth(self, first: int = 0) -> Tensor:
        """g_i [SAMPLES, parameters], float64: gradients of the whole loss of each sample."""
        inputs, targets = self.samples(first, SAMPLES)
        model = copy.deepcopy(getattr(self.model, "module", self.model)).double()

        class Loss(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(_, inputs: Tensor, target: Tensor) -> Tensor:
                return self.problem.loss(model, inputs[None], target[None])

        loss = Loss()
        gradient = torch.func.grad(functools.partial(torch.func.functional_call, loss))
        gradients = torch.func.vmap(lambda w, x, y: gradient(w, (x, y)), (None, 0, 0))(
            dict(loss.named_parameters()), inputs.double(), targets
        )
        return torch.cat([g.detach().flatten(1) for g in gradients.values()], dim=1).cpu()


def seen(rank: int, overrides: list[str]) -> list[GradientStatistics]:
    """In-sample products, products with the gradient of the step before, and coordinates. Always of a second step
    over other samples, that must not see the first."""
    found = []
    for needs in (IN_SAMPLE, PREVIOUS, COORDINATES):
        trial = Trial(config(*overrides, *STEP), rank)
        capture = capture_for(needs, trial.model, None, trial.ranks, trial.problem.l2)
        trial.step(capture)
        found.append(trial.step(capture, first=SAMPLES))
    return found


def elements_of_unit(overrides: list[str]) -> int:
    """Of the layers' inputs and outputs, for one micro-batch."""
    model = Trial(config(*overrides, *STEP)).model
    elements = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        nonlocal elements
        elements += inputs[0].numel() + outputs.numel()

    for module in layers_of(model):
        module.register_forward_hook(count)
    model(Trial(config(*overrides, *STEP)).samples(0, MICRO)[0])
    return elements


def assert_true(overrides: list[str], found: list[GradientStatistics]) -> None:
    in_sample, previous, coordinates = found
    trial = Trial(config(*overrides, *STEP, "parallel=single"))
    g, before = trial.truth(first=SAMPLES), trial.truth().mean(0)
    mean = g.mean(0)
    variance = float((g - mean).square().sum() / (SAMPLES - 1))
    for statistics in found:
        assert (statistics.units, statistics.sequences) == (SAMPLES, SAMPLES)
        assert statistics.sum_weighted_sq_norm == pytest.approx(float(g.square().sum()), rel=1e-5)
        assert statistics.variance == pytest.approx(variance, rel=1e-5)

    squared, products = float(mean @ mean), g @ mean
    assert in_sample.along.mean == pytest.approx(squared, rel=1e-5)
    assert in_sample.along.squares == pytest.approx(float(products.square().sum()), rel=1e-5)
    eq_2_6 = float((products - squared).square().sum() / (SAMPLES - 1))
    eq_3_3 = float((g - (products / squared)[:, None] * mean).square().sum() / (SAMPLES - 1))
    assert in_sample.along.variance == pytest.approx(eq_2_6, rel=1e-4)
    assert in_sample.parallel_variance == pytest.approx(eq_2_6 / squared, rel=1e-4)
    assert in_sample.orthogonal_variance == pytest.approx(eq_3_3, rel=1e-4)

    along = g @ before
    assert previous.along.mean == pytest.approx(float(along.mean()), rel=1e-4)
    assert previous.along.variance == pytest.approx(float(along.var()), rel=1e-4)
    assert previous.along.sq_norm == pytest.approx(float(before @ before), rel=1e-5)

    of_all = coordinates.coordinates
    assert of_all.sum_deviation == pytest.approx(float(g.std(0).sum()), rel=1e-4)
    assert of_all.sum_magnitude == pytest.approx(float(mean.abs().sum()), rel=1e-5)
    used = (mean.abs() > 1e-12).numpy()  # also where l2·w alone is not 0, and nothing varies
    with np.errstate(divide="ignore"):
        octaves = np.log2((g.var(0) / mean.square()).numpy()[used]).clip(LOWEST_OCTAVE)
    assert sum(of_all.ratio_counts) == pytest.approx(used.sum(), abs=0.01 * used.sum())
    for share in (0.1, 0.5, 0.9):
        bound = math.log2(of_all.ratio_quantile(share))
        assert -0.01 < bound - np.quantile(octaves, share, method="inverted_cdf") < 1.5 / BINS_PER_OCTAVE


@pytest.mark.parametrize("room", ["for all", "for some", "for none"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_process(problem: str, room: str, monkeypatch: pytest.MonkeyPatch):
    """Products from kept layers, from the Jacobian of the logits, and from both in one step."""
    # A few samples of a micro-batch at a time
    monkeypatch.setattr(pipeline.gradients.layers, "ELEMENTS", 2 * 9 * 64)
    if room != "for all":
        some = 1.5 * elements_of_unit(PROBLEMS[problem])
        monkeypatch.setattr(pipeline.gradients.sample, "KEPT_ELEMENTS", some if room == "for some" else 0)
    assert_true(PROBLEMS[problem], seen(0, PROBLEMS[problem]))


def each(rank: int) -> list[list[GradientStatistics]]:
    return [seen(rank, [*overrides, *MESHES["ddp2"]]) for overrides in PROBLEMS.values()]


@pytest.mark.slow
def test_two_ranks():
    """Under DDP the statistics are of the samples of both."""
    first, second = gloo_ranks(2, each)
    assert first == second
    for overrides, found in zip(PROBLEMS.values(), first, strict=True):
        assert_true(overrides, found)


@pytest.mark.parametrize("positions", [(9, 9), (2, 2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (1, 2, 0, 1), (3, 2, 2, 2)]
)
def test_convolutions(positions, bias: bool, kernel: int, stride: int, padding: int, dilation: int):
    """Both ways to the norm, by outputs where there are many positions and by positions where there are few."""
    torch.manual_seed(0)
    module = torch.nn.Conv2d(6, 7, kernel, stride, padding, dilation, bias=bias).double()
    inputs = torch.randn(5, 6, *(stride * n for n in positions), dtype=torch.float64)
    deltas = torch.randn_like(module(inputs))
    squares = [torch.zeros_like(p) for p in module.parameters()]
    for x, d in zip(inputs, deltas, strict=True):
        for total, g in zip(
            squares, torch.autograd.grad(module(x[None]), list(module.parameters()), d[None]), strict=True
        ):
            total += g.square()
    with torch.no_grad():
        layer = layers_of(module)[module]
        assert layer.sum_sq_norm(inputs, deltas).item() == pytest.approx(sum(float(s.sum()) for s in squares))
        for ours, truth in zip(layer.sum_squares(inputs, deltas), squares, strict=True):
            assert torch.allclose(ours, truth)


@pytest.mark.parametrize("needs", [IN_SAMPLE, COORDINATES])
def test_measuring_leaves_the_gradient_as_it_is(needs: Needs):
    gradients = []
    for measured in (False, True):
        trial = Trial(config(*PROBLEMS["resnet18"], *STEP))
        if measured:
            trial.step(capture_for(needs, trial.model, None, trial.ranks))
        else:
            for start, count in zip(range(0, SAMPLES, MICRO), COUNTS, strict=True):
                inputs, targets = trial.samples(start, count)
                (trial.problem.loss(trial.model, inputs, targets) / count * (count / SAMPLES)).backward()
        gradients.append([p.grad for p in trial.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


RUN = [
    *("model=logistic", "data=digits", "model.l2=0.01", "optim=sgd", "optim.lr=0.05", "lr.warmup_tokens=0"),
    *("data.micro_batch=4", "batch.size=8", "budget.tokens=804", "batch.max_size=128", "eval.sequences=100"),
]
TESTS = {
    "norm_test": ["batch=norm_test"],
    "noise_scale": ["batch=noise_scale", "batch.norm=l1", "batch.signal=plain"],
    "inner_product": ["batch=inner_product", "batch.direction=in_sample"],
    "along momentum": ["batch=inner_product"],
    "coordinate_norm_test": ["batch=coordinate_norm_test"],
}


@pytest.mark.parametrize("test", TESTS)
def test_trains_by_the_exact_test(test: str, home: Path):
    """The schedule decides; with a demand that every batch meets the losses are those of a constant batch."""
    exact = [*TESTS[test], "batch.estimator=sample"]
    run = train_here(config(*RUN, *exact, "batch.eta=0.3", "batch.c=0.3", "batch.ema=0"))
    assert max(column(run, "batch/size")) > 8 and {"grew", "capped"} & set(column(run, "batch/reason"))
    easy = ["batch.eta=1e6", "batch.c=1e6", "batch.theta=1e6", "batch.nu=1e6", "batch.size=8"]
    passed = train_here(config(*RUN, *exact, *easy))
    plain = train_here(config(*RUN, "batch=constant", "batch.size=8"))
    assert "passed" in column(passed, "batch/reason")
    assert column(passed, "train/loss") == column(plain, "train/loss")
    assert column(passed, "val/loss") == column(plain, "val/loss")


def test_a_model_with_unknown_layers_is_refused():
    with pytest.raises(TypeError, match="no way to tell the samples' gradients of a BatchNorm2d"):
        layers_of(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))


def test_two_uses_of_a_layer_are_noticed():
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(self.linear(inputs))

    model = Twice()
    capture = SampleCapture(model, ranks_of(config()))
    capture.start_step([2])
    with pytest.raises(AssertionError, match="two gradients"), capture.unit(0):
        model(torch.ones(2, 3)).sum().backward()
