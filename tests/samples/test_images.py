"""MNIST's and CIFAR's formats, against files written here byte by byte."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import samples
from pipeline.config import ConfigError
from pipeline.samples import cifar, idx
from tests.samples.support import data

Bytes = NDArray[np.uint8]


def drawn(*shape: int, below: int = 256, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, below, shape, np.uint8)


# --- MNIST's -------------------------------------------------------------------------------------------------


def idx_file(array: Bytes) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """12 images of 5 × 7 pixels, one file packed; 4 held out."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_file(drawn(12, 5, 7)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_file(drawn(12, below=9))))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_file(drawn(4, 5, 7, seed=1)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_file(np.array([0, 9, 1, 2], np.uint8)))
    return tmp_path


def test_idx_images_from_0_to_1_and_their_labels(mnist: Path):
    split = samples.read(data("idx", files=[mnist]))
    images, labels = split.train.at(np.array([3, 11]))
    np.testing.assert_allclose(images, drawn(12, 5, 7)[[3, 11], None] / 255, rtol=1e-6)
    assert labels.tolist() == drawn(12, below=9)[[3, 11]].tolist() and images.dtype == np.float32
    held_out, held_out_labels = split.validation.at(split.validation_indices)
    np.testing.assert_allclose(held_out, drawn(4, 5, 7, seed=1)[:, None] / 255, rtol=1e-6)
    assert held_out_labels.tolist() == [0, 9, 1, 2]
    assert split.train.classes == split.validation.classes == 10 and split.train.shape == (1, 5, 7)
    assert split.train.inputs.dtype == np.uint8  # a quarter of the memory


def test_idx_without_images_held_out_holds_some_of_its_own_out(mnist: Path):
    before = samples.fingerprint(data("idx", files=[mnist]))
    for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (mnist / f"t10k-{name}").unlink()
    split = samples.read(data("idx", "data.validation_fraction=0.25", files=[mnist]))
    assert (len(split.train_indices), len(split.validation_indices)) == (9, 3)
    assert samples.fingerprint(data("idx", files=[mnist])) != before


IMAGES = idx_file(drawn(12, 5, 7))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "begins with nothing, an idx3 file of unsigned bytes with 00000803"),
        ("train-images-idx3-ubyte", idx_file(drawn(12)), "begins with 00000801, an idx3 file .* with 00000803"),
        ("train-images-idx3-ubyte", b"\x00\x00\x0d\x03" + IMAGES[4:], "begins with 00000d03"),
        ("train-images-idx3-ubyte", IMAGES[:10], "begins with 00000803"),
        ("train-images-idx3-ubyte", IMAGES[:-1], r"419 bytes after the header, which promises 12 × 5 × 7 = 420"),
        ("train-images-idx3-ubyte", IMAGES + b"x", r"421 bytes after the header, which promises 12 × 5 × 7 = 420"),
        ("train-images-idx3-ubyte", idx_file(drawn(0, 5, 7)), r"0 bytes after the header, which promises 0 × 5 × 7 = 0"),
        ("train-images-idx3-ubyte", idx_file(drawn(11, 5, 7)), "has 11 images, and its labels are 12"),
        ("train-labels-idx1-ubyte", idx_file(np.full(12, 3, np.uint8)), "train-labels-idx1-ubyte: all labels are 3; at least two"),
        ("t10k-images-idx3-ubyte", idx_file(drawn(4, 7, 5)), "its images are of 7 × 5 pixels, those to train on of 5 × 7"),
        ("train-labels-idx1-ubyte", idx_file(drawn(3)), "train-images-idx3-ubyte: has 12 images, and its labels are 3"),
    ],
)  # fmt: skip
def test_malformed_idx_files(name: str, content: bytes, message: str, mnist: Path):
    (mnist / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        samples.read(data("idx", files=[mnist]))


def test_a_broken_archive(mnist: Path):
    packed = mnist / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte\.gz: cannot be read"):
        samples.read(data("idx", files=[mnist]))


def test_missing_idx_files(mnist: Path):
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match=r"no file \S*/t10k-labels-idx1-ubyte\. The data set: MNIST: http"):
        samples.fingerprint(data("idx", files=[mnist]))
    with pytest.raises(ConfigError, match=re.escape(idx.PUBLISHED)):
        samples.fingerprint(data("idx", files=[mnist / "nowhere"]))
    with pytest.raises(
        ConfigError, match=r"data=idx needs one, the directory of its files\. The data set: MNIST: http"
    ):
        data("idx")


# --- CIFAR's -------------------------------------------------------------------------------------------------


def cifar_file(path: Path, images: Bytes, *labels: Bytes) -> None:
    path.write_bytes(
        b"".join(
            bytes([*own_labels]) + image.tobytes() for image, *own_labels in zip(images, *labels, strict=True)
        )
    )


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    for batch in range(1, 6):
        labels = drawn(6, below=10, seed=batch)
        cifar_file(tmp_path / f"data_batch_{batch}.bin", drawn(6, 3, 32, 32, seed=batch), labels)
    cifar_file(tmp_path / "test_batch.bin", drawn(4, 3, 32, 32), np.array([9, 0, 1, 2], np.uint8))
    return tmp_path


def test_cifar_10_images_and_labels_in_the_order_of_the_batches(cifar10: Path):
    split = samples.read(data("cifar", "data.standardise=false", files=[cifar10]))
    images, labels = split.train.at(np.arange(30))
    expected = np.concatenate([drawn(6, 3, 32, 32, seed=batch) for batch in range(1, 6)])
    np.testing.assert_allclose(images, expected / 255, rtol=1e-6)
    assert labels.tolist() == [label for batch in range(1, 6) for label in drawn(6, below=10, seed=batch)]
    held_out, held_out_labels = split.validation.at(split.validation_indices)
    np.testing.assert_allclose(held_out, drawn(4, 3, 32, 32) / 255, rtol=1e-6)
    assert held_out_labels.tolist() == [9, 0, 1, 2]
    assert split.train.classes == 10 and split.train.inputs.dtype == np.uint8


def test_cifar_100_has_the_fine_labels(tmp_path: Path):
    fine = np.array([99, 0, 50], np.uint8)
    cifar_file(tmp_path / "train.bin", drawn(3, 3, 32, 32), drawn(3, below=20), fine)
    cifar_file(tmp_path / "test.bin", drawn(3, 3, 32, 32, seed=1), drawn(3, below=20), fine[::-1])
    split = samples.read(data("cifar", "data.standardise=false", files=[tmp_path]))
    images, labels = split.train.at(np.arange(3))
    np.testing.assert_allclose(images, drawn(3, 3, 32, 32) / 255, rtol=1e-6)
    assert labels.tolist() == [99, 0, 50] and split.validation.labels.tolist() == [50, 0, 99]
    assert split.train.classes == 100
    assert samples.fingerprint(data("cifar", files=[tmp_path])).startswith("cifar100-")


def test_malformed_cifar_files(cifar10: Path):
    batch = cifar10 / "data_batch_3.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(
        ConfigError, match=r"data_batch_3\.bin: 18437 bytes, no multiple of the 3073 of a CIFAR-10"
    ):
        samples.read(data("cifar", files=[cifar10]))
    batch.write_bytes(whole[: 2 * 3073] + b"\x0a" + whole[2 * 3073 + 1 :])
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin: image 3 has label 10, CIFAR-10 has 0 to 9"):
        samples.read(data("cifar", files=[cifar10]))


def test_missing_cifar_files(cifar10: Path):
    (cifar10 / "data_batch_4.bin").unlink()
    with pytest.raises(
        ConfigError, match=rf"no file {cifar10}/data_batch_4\.bin\. .*{re.escape(cifar.PUBLISHED)}"
    ):
        samples.fingerprint(data("cifar", files=[cifar10]))
