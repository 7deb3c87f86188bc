"""Samples in memory: sparse rows, what is held out, scaling, and the order in which a run reads them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.preprocessing import StandardScaler

from pipeline import samples
from pipeline.config import ConfigError
from pipeline.samples import _samples
from pipeline.samples._samples import Samples, SampleStream, SparseRows, Split, hold_out, standardise
from tests.samples.support import data


def sparse_rows(matrix: scipy.sparse.csr_matrix) -> SparseRows:
    return SparseRows(
        matrix.indptr.astype(np.int64),
        matrix.indices.astype(np.int64),
        matrix.data.astype(np.float32),
        matrix.shape[1],
    )


def labelled(inputs: Any, **scaling: Any) -> Samples:
    return Samples(inputs, np.arange(inputs.shape[0]) % 3, classes=3, **scaling)


def test_sparse_rows_in_any_order_repeated_and_empty():
    matrix = scipy.sparse.random(50, 30, 0.1, "csr", random_state=0)
    rows, dense = sparse_rows(matrix), matrix.toarray().astype(np.float32)
    assert rows.shape == (50, 30) and (dense == 0).all(1).any()
    for chosen in ([7, 3, 3, 49, 0], list(range(50)), [], np.flatnonzero((dense == 0).all(1))):
        indices = np.array(chosen, np.int64)
        np.testing.assert_array_equal(rows[indices], dense[indices])


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(1797, 0.2, 359), (10, 0.01, 1), (10, 0.999, 9), (2, 0.5, 1)]
)
def test_held_out_samples_are_others_and_always_the_same(count: int, fraction: float, held: int):
    split = hold_out(labelled(np.zeros((count, 1))), fraction)
    assert len(split.validation_indices) == held
    together = np.concatenate([split.train_indices, split.validation_indices])
    np.testing.assert_array_equal(np.sort(together), np.arange(count))
    again = hold_out(labelled(np.zeros((count, 1))), fraction)
    np.testing.assert_array_equal(split.validation_indices, again.validation_indices)


def test_held_out_samples_are_a_random_choice():
    """Whatever the order of the file, say by label: their mean place is that of a draw without repetition."""
    split = hold_out(labelled(np.zeros((10_000, 1))), 0.1)
    deviation = 10_000 / np.sqrt(12 * 1000)
    assert abs(split.validation_indices.mean() - 5000) < 4 * deviation


def test_one_sample_is_too_few():
    with pytest.raises(ConfigError, match="1 sample: at least two are needed"):
        hold_out(labelled(np.zeros((1, 3))), 0.5)


@pytest.fixture(params=[4, 2**22])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_samples, "_VALUES_AT_ONCE", request.param)


def table() -> np.ndarray:
    """Features of very different scale and place; the fourth constant, at a number without a finite binary form."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(60, 5)) * [1, 1e-3, 1e3, 0, 1] + [0, 7, -1e4, 0.1, 0]
    matrix[rng.random(60) < 0.7, 4] = 0
    return matrix.astype(np.float32)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_standardised_features_are_those_of_scikit_learn(form: str, in_parts: None):
    matrix = table()
    inputs = matrix if form == "dense" else sparse_rows(scipy.sparse.csr_matrix(matrix))
    own = labelled(inputs)
    split = standardise(Split(own, np.arange(0, 60, 2), own, np.arange(1, 60, 2)))
    scaler = StandardScaler().fit(matrix[::2].astype(float))
    changing = [0, 1, 2, 4]
    for part, indices in ((split.train, split.train_indices), (split.validation, split.validation_indices)):
        got, _ = part.at(indices)
        expected = scaler.transform(matrix[indices].astype(float))
        np.testing.assert_allclose(got[:, changing], expected[:, changing], rtol=1e-3, atol=2e-3)
        assert not got[:, 3].any() and got.dtype == np.float32


def test_standardised_images_have_mean_0_and_variance_1_in_each_channel(in_parts: None):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 5), np.uint8)
    images[:, 1] //= 4
    images[:, 2] = 9
    split = standardise(Split.of(labelled(images, scale=1 / 255), labelled(images[:7], scale=1 / 255)))
    got, _ = split.train.at(np.arange(20))
    mean = images.mean((0, 2, 3), keepdims=True)
    expected = (images - mean) / np.where(np.arange(3) == 2, 1, images.std((0, 2, 3)))[None, :, None, None]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(split.validation.at(np.arange(7))[0], got[:7])
    assert split.train.inputs.dtype == np.uint8


def test_a_data_set_is_standardised_if_asked_for():
    plain, scaled = (
        samples.read(data("breast_cancer", f"data.standardise={flag}")) for flag in ("false", "true")
    )
    inputs, _ = scaled.train.at(scaled.train_indices)
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std(0), 1, atol=1e-4)
    np.testing.assert_array_equal(scaled.train_indices, plain.train_indices)


# --- the order contract ------------------------------------------------------------------------------------


def stream(count: int = 23, seed: int = 5) -> SampleStream:
    """Of samples whose input is their index: the odd ones of 2 · count."""
    own = labelled(np.arange(2 * count, dtype=np.float32)[:, None])
    return SampleStream(own, np.arange(1, 2 * count, 2), seed)


def test_an_epoch_holds_every_sample_once_each_in_another_order():
    epochs = [stream().read(23 * epoch, 23)[0][:, 0].tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 46, 2))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream(seed=6).read(0, 23)[0][:, 0].tolist() != epochs[0]


@pytest.mark.parametrize("cuts", [[0, 100], [0, 1, 2, 40, 47, 100], list(range(0, 101, 10))])
def test_the_order_does_not_depend_on_what_is_read_at_a_time(cuts: list[int]):
    whole = stream().read(0, 100)
    parts = [stream().read(first, end - first) for first, end in itertools.pairwise(cuts)]
    for got, expected in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(got), expected)


def test_inputs_and_labels_belong_together():
    inputs, labels = stream().read(0, 60)
    np.testing.assert_array_equal(labels, inputs[:, 0] % 3)
    assert (inputs.dtype, labels.dtype) == (np.float32, np.int64)


def test_scaling_keeps_the_order():
    plain = labelled(np.arange(12.0)[:, None])
    scaled = dataclasses.replace(plain, mean=3.0, scale=0.5)
    one, other = (SampleStream(own, np.arange(12), seed=0).read(0, 12)[0] for own in (plain, scaled))
    np.testing.assert_allclose(other, (one - 3) / 2)
