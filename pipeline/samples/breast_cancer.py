"""569 tumours in 30 measured features, benign or malignant (Street, Wolberg, Mangasarian 1993, UCI), as
scikit-learn ships them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.samples._samples import Samples
from pipeline.samples._shipped import fingerprint_of, shipped

if TYPE_CHECKING:
    from pipeline.config import DataConfig

FILE = "breast_cancer.csv"


def settings(data: DataConfig) -> frozenset[str]:
    return frozenset(["validation_fraction"])


def check(data: DataConfig) -> list[str]:
    return []


def fingerprint(data: DataConfig) -> str:
    return fingerprint_of(shipped(FILE))


def read(data: DataConfig) -> tuple[Samples, None]:
    """Features [30] as measured, from 1e-3 to 4e3; label 1 is benign."""
    table = np.loadtxt(shipped(FILE), delimiter=",", skiprows=1, dtype=np.float32)
    return Samples(table[:, :-1], table[:, -1].astype(np.int64), classes=2), None
