"""Grey images in the format of MNIST (LeCun, Cortes, Burges 1998): `data.files` is the directory of
train-images-idx3-ubyte and train-labels-idx1-ubyte, each also packed (.gz). Those that begin with t10k
instead of train are held out if they are there."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError
from pipeline.data.fingerprint import of_files
from pipeline.samples._files import found, one_directory, opened
from pipeline.samples._samples import Samples

if TYPE_CHECKING:
    from pipeline.config import DataConfig

PUBLISHED = "MNIST: http://yann.lecun.com/exdb/mnist/ and https://storage.googleapis.com/cvdf-datasets/mnist/"
_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")


def settings(data: DataConfig) -> frozenset[str]:
    return frozenset(["validation_fraction"])  # whether t10k is there, an id cannot know


def check(data: DataConfig) -> list[str]:
    return one_directory(data.files, "idx", PUBLISHED)


def fingerprint(data: DataConfig) -> str:
    train, held_out = _paths(data)
    return of_files([*train, *held_out], "idx")


def read(data: DataConfig) -> tuple[Samples, Samples | None]:
    """Images [1, height, width] from 0 to 1. Raises ConfigError with the file that is malformed."""
    parts = [(_array(images, 3), _array(labels, 1)) for images, labels in filter(None, _paths(data))]
    for (images, labels), (path, _) in zip(parts, _paths(data), strict=False):
        if len(images) != len(labels):
            raise ConfigError(f"{path}: has {len(images)} images, and its labels are {len(labels)}")
        if images.shape[1:] != parts[0][0].shape[1:]:
            raise ConfigError(
                f"{path}: its images are of {_by(images.shape[1:])} pixels, those to train on of "
                f"{_by(parts[0][0].shape[1:])}"
            )
    classes = max(int(labels.max(initial=0)) for _, labels in parts) + 1
    labels = parts[0][1]
    if labels.min() == labels.max():
        raise ConfigError(
            f"{_paths(data)[0][1]}: all labels are {labels[0]}; at least two classes are needed"
        )
    train, *held_out = (
        Samples(images[:, None], labels.astype(np.int64), classes, scale=1 / 255) for images, labels in parts
    )
    return train, held_out[0] if held_out else None


def _paths(data: DataConfig) -> tuple[list[str], list[str]]:
    """Images and labels to train on; those held out, or nothing."""
    directory = Path(data.files[0])
    train = found([_packed_or_not(directory / f"train-{name}") for name in _NAMES], "idx", PUBLISHED)
    held_out = [_packed_or_not(directory / f"t10k-{name}") for name in _NAMES]
    return train, found(held_out, "idx", PUBLISHED) if any(path.is_file() for path in held_out) else []


def _packed_or_not(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _array(path: str, dimensions: int) -> NDArray[np.uint8]:
    """Big-endian: two bytes 0, 8 for unsigned bytes, the number of dimensions, each of them, and the data."""
    with opened(path) as file:
        content = file.read()
    magic, start = 0x0800 + dimensions, 4 + 4 * dimensions
    if len(content) < start or int.from_bytes(content[:4], "big") != magic:
        raise ConfigError(f"{path}: begins with {content[:4].hex() or 'nothing'}, an idx{dimensions} file of "
                          f"unsigned bytes with {magic:08x}")  # fmt: skip
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    array = np.frombuffer(content, np.uint8, offset=start)
    if array.size != (expected := int(np.prod(shape, dtype=object))) or not expected:
        raise ConfigError(
            f"{path}: {array.size} bytes after the header, which promises {_by(shape)} = {expected}"
        )
    return array.reshape(shape)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
