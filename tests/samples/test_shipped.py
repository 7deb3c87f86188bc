"""Data sets that need no file of the user's: scikit-learn's, and the drawn one."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_digits

from pipeline import samples
from pipeline.config import ConfigError
from tests.samples.support import data


def test_digits_are_those_of_scikit_learn():
    split = samples.read(data("digits"))
    images, labels = split.train.at(np.arange(1797))
    expected = load_digits()
    np.testing.assert_array_equal(images[:, 0], expected.images / 16)
    np.testing.assert_array_equal(labels, expected.target)
    assert split.train.shape == (1, 8, 8) and split.train.classes == 10


def test_tumours_are_those_of_scikit_learn():
    split = samples.read(data("breast_cancer", "data.standardise=false"))
    features, labels = split.train.at(np.arange(569))
    expected = load_breast_cancer()
    np.testing.assert_array_equal(features, expected.data.astype(np.float32))
    np.testing.assert_array_equal(labels, expected.target)
    assert split.train.classes == 2


@pytest.mark.parametrize("source", ["digits", "breast_cancer"])
def test_without_scikit_learn(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"data={source}: .*pip install 'crescendo\[problems\]'"):
        samples.fingerprint(data(source))


# --- synthetic_logistic -----------------------------------------------------------------------------------------


def test_the_drawn_data_follow_their_description():
    """At 30,000 × 10: independent normal features of the said deviations, labels that a logistic model explains
    with logits of deviation 3, and no better than that."""
    split = samples.read(data("synthetic_logistic", "data.samples=30000", "data.features=10"))
    inputs, labels = (array.astype(float) for array in split.train.at(np.arange(30_000)))
    deviations = np.geomspace(1, 0.1, 10)
    assert abs(inputs.mean(0) / deviations).max() < 5 / np.sqrt(30_000)
    np.testing.assert_allclose(inputs.std(0), deviations, rtol=5 / np.sqrt(2 * 30_000))
    correlation = np.corrcoef(inputs.T) - np.eye(10)
    assert abs(correlation).max() < 5 / np.sqrt(30_000)
    assert abs((np.clip(inputs / deviations, -1, 1) ** 2).mean() - 0.5161) < 2e-3  # of a normal: 1 − 2φ(1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = inputs @ weights
        losses = np.logaddexp(0, logits) - labels * logits
        return losses.mean(), inputs.T @ (1 / (1 + np.exp(-logits)) - labels) / len(labels)

    found = minimize(loss, np.zeros(10), jac=True, method="BFGS", tol=1e-8).x
    logits = inputs @ found
    assert logits.std() == pytest.approx(3, rel=0.04)
    probabilities = 1 / (1 + np.exp(-logits))
    for low in np.arange(0, 1, 0.1):  # calibrated in every tenth
        inside = (probabilities >= low) & (probabilities < low + 0.1)
        expected = probabilities[inside].mean()
        assert labels[inside].mean() == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(inside.sum()))


def test_the_drawn_data_are_always_the_same():
    """Their first numbers and a sum over all as written down once: another numpy must draw them too."""
    split = samples.read(data("synthetic_logistic", "seed=3", "data.seed=4"))
    inputs, labels = split.train.at(np.arange(7000))
    assert inputs.shape == (7000, 50)
    np.testing.assert_allclose(inputs[0, :3], [-1.06847954, -0.43564045, 1.17612922], rtol=1e-6)
    assert labels[:16].tolist() == [1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert labels.sum() == 3529
    assert inputs.sum(dtype=np.float64) == pytest.approx(52.042940, rel=1e-6)
    assert samples.fingerprint(data("synthetic_logistic")) == "synthetic-logistic-7000x50"


def test_what_the_drawn_data_need():
    with pytest.raises(ConfigError, match=r"data\.features=null: .*needs a number; the paper's is 50"):
        data("synthetic_logistic", "data.features=null")
    with pytest.raises(ConfigError, match=r"data\.samples=1: .*Nearest: 2"):
        data("synthetic_logistic", "data.samples=1")
