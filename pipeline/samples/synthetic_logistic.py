"""Data drawn from a logistic model, in the form of the synthetic set of Bollapragada, Byrd and Nocedal 2018
(arXiv 1710.11258): `data.samples` × `data.features`, 7,000 × 50 there.

How theirs was drawn is not known to us; here it is
    x_j ~ N(0, s_j²)   with s_j falling geometrically from 1 to 0.1, so that the covariance has condition 100,
    w_j ~ N(0, 1)      scaled so that wᵀx has standard deviation 3,
    y   ~ Bernoulli(σ(wᵀx)).
The labels are noisy, so the loss has a finite minimum without l2, and the best classifier errs in about one
of seven cases. The draw is the same whatever the seeds of a run: it is the data set, not its order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.samples._samples import Samples

if TYPE_CHECKING:
    from pipeline.config import DataConfig

SEED = 20181710
SMALLEST_DEVIATION = 0.1
LOGIT_DEVIATION = 3.0


def settings(data: DataConfig) -> frozenset[str]:
    return frozenset(["samples", "features", "validation_fraction"])


def check(data: DataConfig) -> list[str]:
    problems = []
    if data.features is None:
        problems.append("data.features=null: data=synthetic_logistic needs a number; the paper's is 50")
    if data.samples < 2:
        problems.append(f"data.samples={data.samples}: one to train on and one to validate with. Nearest: 2")
    return problems


def fingerprint(data: DataConfig) -> str:
    return f"synthetic-logistic-{data.samples}x{data.features}"


def read(data: DataConfig) -> tuple[Samples, None]:
    """Features [data.features]."""
    assert data.features
    n, width = data.samples, data.features
    normals = width + n * width
    radii, angles, thresholds = np.split(_uniform(2 * normals + n), [normals, 2 * normals])
    normal = _normal(radii, angles)
    deviations = SMALLEST_DEVIATION ** np.linspace(0, 1, width)
    weights = normal[:width]
    weights *= LOGIT_DEVIATION / np.sqrt(np.square(weights * deviations).sum())
    inputs = normal[width:].reshape(n, width) * deviations
    logits = np.einsum("ij,j->i", inputs, weights)  # not @, whose order of summation depends on the BLAS
    labels = thresholds < 1 / (1 + np.exp(-logits))
    return Samples(inputs.astype(np.float32), labels.astype(np.int64), classes=2), None


def _uniform(count: int) -> NDArray[np.float64]:
    """In [0, 1). From the bits of PCG64, which numpy promises to keep; what its Generator makes of them may
    change with the version (NEP 19)."""
    bits = np.random.PCG64(SEED).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _normal(radii: NDArray[np.float64], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Box and Muller 1958, the cosine of each pair."""
    result: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-radii)) * np.cos(2 * np.pi * angles)
    return result
