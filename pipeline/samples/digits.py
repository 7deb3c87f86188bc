"""1,797 handwritten digits of 8 × 8 pixels (Alpaydin and Kaynak 1998, UCI), as scikit-learn ships them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.samples._samples import Samples
from pipeline.samples._shipped import fingerprint_of, shipped

if TYPE_CHECKING:
    from pipeline.config import DataConfig

FILE = "digits.csv.gz"


def settings(data: DataConfig) -> frozenset[str]:
    return frozenset(["validation_fraction"])


def check(data: DataConfig) -> list[str]:
    return []


def fingerprint(data: DataConfig) -> str:
    return fingerprint_of(shipped(FILE))


def read(data: DataConfig) -> tuple[Samples, None]:
    """Images [1, 8, 8] from 0 to 1 in sixteenths."""
    table = np.loadtxt(shipped(FILE), delimiter=",", dtype=np.float32)
    return Samples(table[:, :-1].reshape(-1, 1, 8, 8) / 16, table[:, -1].astype(np.int64), classes=10), None
