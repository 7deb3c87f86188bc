"""Classifiers against the same computation written down from the papers, and their initial weights."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pipeline.model as models
from pipeline import registry
from pipeline.config import ClassifierConfig, ConfigError
from pipeline.model import resnet18
from pipeline.model._classifier import Classifier
from pipeline.model.init import initialise
from tests.support import config

COLOUR = (3, 32, 32)


@functools.cache  # composing takes long
def settings_of(kind: str, *overrides: str) -> ClassifierConfig:
    model = config("data=digits", f"model={kind}", *overrides).model
    assert isinstance(model, ClassifierConfig)
    return model


def built(
    kind: str,
    *overrides: str,
    shape: tuple[int, ...] = COLOUR,
    outputs: int = 10,
    device: str = "meta",
    seed: int = 0,
) -> Classifier:
    with torch.device(device):
        model: Classifier = registry.load(models, kind).build(settings_of(kind, *overrides), shape, outputs)
    initialise(model, seed)
    return model


def randomised(
    kind: str, *overrides: str, shape: tuple[int, ...] = COLOUR
) -> tuple[Classifier, dict[str, Tensor]]:
    """With weights that leave no term out: norms that are not 1, biases that are not 0."""
    model = built(kind, *overrides, shape=shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, {name: parameter.detach() for name, parameter in model.named_parameters()}


def inputs_of(shape: tuple[int, ...] = COLOUR, count: int = 3) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "overrides", "shape", "outputs", "expected"),
    [
        ("resnet18", [], COLOUR, 10, 11_173_962),  # of ResNet-18 for CIFAR-10 everywhere
        ("logistic", [], (30,), 1, 31),
        ("logistic", [], (1, 8, 8), 10, 650),
        ("mlp", [], (1, 8, 8), 10, 64 * 64 + 64 + 64 * 10 + 10),
        ("mlp", ["model.widths=[]"], (30,), 2, 62),
        ("cnn", [], (1, 28, 28), 10, 9 * 16 + 16 + 16 * 9 * 32 + 32 + 32 * 49 * 10 + 10),
        ("cnn", [], (3, 9, 6), 10, 3 * 9 * 16 + 16 + 16 * 9 * 32 + 32 + 32 * 2 * 1 * 10 + 10),
    ],
)
def test_number_of_parameters(
    kind: str, overrides: list[str], shape: tuple[int, ...], outputs: int, expected: int
):
    model = built(kind, *overrides, shape=shape, outputs=outputs)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model(inputs_of(shape)).shape == (3, outputs)


def test_logistic_is_an_affine_map():
    model, weights = randomised("logistic")
    expected = inputs_of().flatten(1) @ weights["linear.weight"].T + weights["linear.bias"]
    torch.testing.assert_close(model(inputs_of()), expected)


def test_mlp_is_linear_maps_with_relus_between():
    model, w = randomised("mlp", "model.widths=[7,5]")
    expected = inputs_of().flatten(1)
    for layer in range(3):
        expected = expected @ w[f"linears.{layer}.weight"].T + w[f"linears.{layer}.bias"]
        expected = expected.clamp(min=0) if layer < 2 else expected
    torch.testing.assert_close(model(inputs_of()), expected)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 6)])
def test_cnn_convolves_and_halves_twice(shape: tuple[int, int, int]):
    model, w = randomised("cnn", "model.widths=[2,3]", shape=shape)
    expected = inputs_of(shape)
    for name in ("first", "second"):
        columns = F.unfold(expected, 3, padding=1)  # [n, 9 · channels, pixels]
        channels = w[f"{name}.weight"].flatten(1) @ columns + w[f"{name}.bias"][:, None]
        image = channels.clamp(min=0).unflatten(2, expected.shape[2:])
        height, width = (size // 2 * 2 for size in image.shape[2:])
        blocks = image[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        expected = blocks.amax((3, 5))
    expected = expected.flatten(1) @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(inputs_of(shape)), expected)


def test_resnet18_is_that_of_the_paper_with_group_norms():
    """Table 1 of He et al. 2016: four stages of two blocks, each from the second on halving the image; shortcuts are
    projections (option B) where the shape changes."""
    widths = [16, 16, 32, 64]
    model, w = randomised("resnet18", f"model.widths={widths}")

    def normalised(x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (x.shape[1] // 16, 16))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        whole = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        return whole * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    x = normalised(F.conv2d(inputs_of(), w["stem.weight"], padding=1), "stem_norm").relu()
    for number in range(8):
        stride, block = 2 if number in (2, 4, 6) else 1, f"blocks.{number}"
        y = normalised(
            F.conv2d(x, w[f"{block}.first.weight"], stride=stride, padding=1), f"{block}.first_norm"
        )
        y = normalised(F.conv2d(y.relu(), w[f"{block}.second.weight"], padding=1), f"{block}.second_norm")
        if stride == 2:
            x = normalised(F.conv2d(x, w[f"{block}.shortcut.0.weight"], stride=2), f"{block}.shortcut.1")
        x = (x + y).relu()
    assert x.shape == (3, 64, 4, 4)
    expected = x.mean((2, 3)) @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(inputs_of()), expected, rtol=1e-4, atol=1e-4)
    assert len(model.layers) == 9


@pytest.mark.parametrize("kind", ["logistic", "mlp", "cnn", "resnet18"])
def test_a_sample_is_judged_by_itself(kind: str):
    """As batch tests need it: what else is in the micro-batch changes nothing, in training mode too."""
    small = ["model.widths=[4,4,8,8]"] if kind == "resnet18" else []
    model, _ = randomised(kind, *small)
    model.train()
    torch.testing.assert_close(model(inputs_of())[1:2], model(inputs_of()[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 1), (16, 1), (64, 4), (512, 32), (33, 1), (50, 2), (72, 4)]
)
def test_groups_of_any_number_of_channels(channels: int, groups: int):
    assert resnet18.norm(channels).num_groups == groups


# --- initial weights -----------------------------------------------------------------------------------------


def weights(kind: str, *overrides: str, device: str = "meta", seed: int = 0) -> dict[str, Tensor]:
    return dict(built(kind, *overrides, device=device, seed=seed).state_dict())


@pytest.mark.parametrize("kind", ["logistic", "mlp", "cnn", "resnet18"])
def test_they_depend_on_seed_and_name_alone(kind: str):
    small = ["model.widths=[4,4,8,8]"] if kind == "resnet18" else []
    expected = weights(kind, *small)
    torch.manual_seed(123)
    again, other = weights(kind, *small, device="cpu"), weights(kind, *small, seed=1)
    for name, tensor in expected.items():
        assert torch.equal(tensor, again[name]), name
        random = tensor.dim() > 1 and kind != "logistic"
        assert torch.equal(tensor, other[name]) != random, name
    drawn = [tuple(tensor.flatten()[:8].tolist()) for tensor in expected.values() if tensor.dim() > 1]
    assert kind == "logistic" or len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet18"])
def test_relus_keep_the_variance(kind: str):
    small = ["model.widths=[16,16,32,32]"] if kind == "resnet18" else []
    for name, tensor in weights(kind, *small).items():
        if tensor.dim() == 1:
            constant = 0 if name.endswith("bias") else 1
            assert torch.equal(tensor, torch.full_like(tensor, constant)), name
            continue
        expected = math.sqrt(2 / tensor[0].numel())
        assert float(tensor.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * tensor.numel())), name


def test_logistic_starts_at_0():
    assert not any(tensor.any() for tensor in weights("logistic").values())


# --- what is refused, and how parameters are gathered ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("cnn", (30,), r"samples of shape \[30\] are no images .* at least 4 × 4 pixels\. Use model=mlp"),
        ("cnn", (1, 3, 8), r"samples of shape \[1, 3, 8\] are no images .* of at least 4 × 4"),
        ("resnet18", (30,), r"samples of shape \[30\] are no images .* Use model=mlp or model=logistic"),
    ],
)
def test_samples_that_are_no_images(kind: str, shape: tuple[int, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        built(kind, shape=shape)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=logistic model.l2=-0.1", r"model\.l2=-0\.1: must not be negative"),
        ("model=logistic model.widths=[3]", r"model\.widths=\[3\]: model=logistic has no hidden layers; it must be \[\]"),
        ("model=mlp model.widths=[3,0]", r"model\.widths=\[3, 0\]: each must be above 0"),
        ("model=cnn model.widths=[3]", r"model\.widths=\[3\]: model=cnn needs 2 of them"),
        ("model=resnet18 model.widths=[3,4]", r"model\.widths=\[3, 4\]: model=resnet18 needs 4 of them"),
        ("model=mlp parallel=tp parallel.tensor=2", r"parallel\.tensor=2: only a language model .*Use parallel=ddp"),
        ("model=mlp parallel.activation_checkpointing=true", r"activation_checkpointing=true: .*Use false with model=mlp"),
        ("model=mlp data.sequence_length=8", r"data\.sequence_length=8: a labelled sample counts as .*Nearest: 1"),
        ("model=tiny", r"model=tiny data=digits: .*Use data=stdlib or data=text with this model, or model=logistic\|mlp"),
        ("model=mlp data=stdlib budget.tokens=9k",
         r"model=mlp data=stdlib: .*Use data=breast_cancer\|.*with this model, or a language model with these data"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        config("data=digits", *override.split())


def test_parameters_are_gathered_together_where_the_loss_reads_them():
    for kind in ("mlp", "resnet18"):
        model = built(kind, *(["model.widths=[4,4,8,8]"] if kind == "resnet18" else []))
        own = {id(parameter) for layer in model.layers for parameter in layer.parameters()}
        assert own and own <= {id(parameter) for parameter in model.parameters()}
        model.gathered_whole = True
        assert not model.layers
