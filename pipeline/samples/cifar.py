"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in the binary version: `data.files` is the directory of
data_batch_1.bin … data_batch_5.bin and test_batch.bin, or of train.bin and test.bin, whose fine labels are
taken. The test images are held out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError
from pipeline.data.fingerprint import of_files
from pipeline.samples._files import found, one_directory
from pipeline.samples._samples import Samples

if TYPE_CHECKING:
    from pipeline.config import DataConfig

PUBLISHED = "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)"
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


def settings(data: DataConfig) -> frozenset[str]:
    return frozenset()


def check(data: DataConfig) -> list[str]:
    return one_directory(data.files, "cifar", PUBLISHED)


def fingerprint(data: DataConfig) -> str:
    train, test, classes = _paths(data)
    return of_files([*train, test], f"cifar{classes}")


def read(data: DataConfig) -> tuple[Samples, Samples]:
    """Images [3, 32, 32] from 0 to 1. Raises ConfigError with the file that is malformed."""
    train, test, classes = _paths(data)
    parts = [_records(path, classes) for path in train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test_images, test_labels = _records(test, classes)
    return (
        Samples(images, labels, classes, scale=1 / 255),
        Samples(test_images, test_labels, classes, scale=1 / 255),
    )


def _paths(data: DataConfig) -> tuple[list[str], str, int]:
    """To train on, held out, and the number of classes."""
    directory = Path(data.files[0])
    hundred = (directory / "train.bin").is_file()
    names = ["train.bin"] if hundred else [f"data_batch_{number}.bin" for number in range(1, 6)]
    names.append("test.bin" if hundred else "test_batch.bin")
    *train, test = found([directory / name for name in names], "cifar", PUBLISHED)
    return train, test, 100 if hundred else 10


def _records(path: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels: a record is its label (of CIFAR-100 the coarse, then the fine one) and the pixels of
    the red, the green and the blue channel, row by row."""
    content = np.fromfile(path, np.uint8)
    size = _PIXELS + (2 if classes == 100 else 1)
    if not content.size or content.size % size:
        raise ConfigError(
            f"{path}: {content.size} bytes, no multiple of the {size} of a CIFAR-{classes} image"
        )
    records = content.reshape(-1, size)
    labels = records[:, -_PIXELS - 1].astype(np.int64)
    if labels.max() >= classes:
        bad = int((labels >= classes).argmax())
        raise ConfigError(
            f"{path}: image {bad + 1} has label {labels[bad]}, CIFAR-{classes} has 0 to {classes - 1}"
        )
    return records[:, -_PIXELS:].reshape(-1, *_SHAPE), labels
