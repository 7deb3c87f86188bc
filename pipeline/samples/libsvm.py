"""Any file in the format of LIBSVM: a line is `label index:value …`, its indices ascend from 1 and what it
does not name is 0. `data.files` is one file, or two of which the second is held out; .gz, .bz2 and .xz are
unpacked.

After the label a `qid:number` may stand, and after `#` anything: both are left out. Labels are whole numbers
of any kind (−1 and 1, 1 and 2, …); in ascending order over all files they become 0 … classes − 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError
from pipeline.data.fingerprint import of_files
from pipeline.samples._files import found, opened
from pipeline.samples._samples import Samples, SparseRows

if TYPE_CHECKING:
    from pipeline.config import DataConfig

PUBLISHED = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/"
_BLOCK_BYTES = 2**23  # parsed at a time: the temporary arrays take some twenty times as much
_LARGEST_INDEX = 2**31 - 1  # LIBSVM's own
_COMMENT = re.compile(rb"#[^\n]*")
_QUERY = re.compile(rb"^([ \t]*[^ \t\n:]+[ \t]+)qid:[+-]?[0-9]+(?=\s|\Z)", re.MULTILINE)
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def settings(data: DataConfig) -> frozenset[str]:
    return frozenset(["features", "validation_fraction"][: 1 if len(data.files) == 2 else 2])


def check(data: DataConfig) -> list[str]:
    if len(data.files) in (1, 2):
        return []
    return [
        f"data.files={data.files}: data=libsvm needs one file, or two of which the second is held out. "
        f"Data sets: {PUBLISHED}"
    ]


def fingerprint(data: DataConfig) -> str:
    return of_files(found([Path(file) for file in data.files], "libsvm", PUBLISHED), "libsvm")


def read(data: DataConfig) -> tuple[Samples, Samples | None]:
    """Features [data.features], by default as many as the largest index of all files. Raises ConfigError with
    file and line number."""
    paths = found([Path(file) for file in data.files], "libsvm", PUBLISHED)
    parsed = [_parse(path, data.features) for path in paths]
    width = data.features or max(int(part.columns.max(initial=0)) + 1 for part in parsed)
    names, labels = np.unique(np.concatenate([part.labels for part in parsed]), return_inverse=True)
    if len(names) < 2:
        raise ConfigError(f"{' '.join(paths)}: all labels are {names[0]:g}; at least two classes are needed")
    ends = np.cumsum([len(part.labels) for part in parsed])
    train, *held_out = (
        Samples(SparseRows(part.starts, part.columns, part.values, width), own_labels, len(names))
        for part, own_labels in zip(parsed, np.split(labels.astype(np.int64), ends[:-1]), strict=True)
    )
    return train, held_out[0] if held_out else None


@dataclass(frozen=True)
class _Parsed:
    """Lines with a label: their labels as written [n], and their values as in SparseRows."""

    labels: NDArray[np.float64]
    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]


def _parse(path: str, features: int | None) -> _Parsed:
    largest = features or _LARGEST_INDEX
    labels: list[NDArray[Any]] = []
    counts: list[NDArray[Any]] = [np.zeros(1, np.int64)]
    columns: list[NDArray[Any]] = []
    values: list[NDArray[Any]] = []
    line = 1
    for block in _blocks(path):
        text = _COMMENT.sub(b"", block)
        if b"qid:" in text:
            text = _QUERY.sub(rb"\1", text)
        try:
            parts = _parse_block(text, largest)
        except ValueError:
            raise ConfigError(_first_problem(path, line, text, largest)) from None
        for whole, part in zip((labels, counts, columns, values), parts, strict=True):
            whole.append(part)
        line += block.count(b"\n")
    if not any(map(len, labels)):
        raise ConfigError(f"{path}: has no samples")
    starts = np.cumsum(np.concatenate(counts))
    return _Parsed(np.concatenate(labels), starts, np.concatenate(columns), np.concatenate(values))


def _blocks(path: str) -> Iterator[bytes]:
    """The file in blocks of whole lines."""
    with opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block + file.readline()


def _parse_block(text: bytes, largest: int) -> tuple[NDArray[Any], ...]:
    """Labels [n], features of each line [n], and of all features columns and values, without a loop over
    them.

    Raises ValueError for whatever the format does not allow, without the place, which `_first_problem` finds.
    """
    characters = np.frombuffer(text, np.uint8)
    is_newline = characters == ord("\n")
    is_space = (characters == ord(" ")) | ((characters >= ord("\t")) & (characters <= ord("\r")))
    edges = np.diff(is_space, prepend=True, append=True)
    begins, ends = np.flatnonzero(edges).reshape(-1, 2).T  # of words
    if not len(begins):
        return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    line_of = np.cumsum(is_newline, dtype=np.int32)[begins]
    is_label = np.diff(line_of, prepend=-1) > 0
    feature_begins, feature_ends = begins[~is_label], ends[~is_label]
    colons = np.flatnonzero(characters == ord(":"))
    _require(len(colons) == len(feature_begins))
    _require((feature_begins < colons).all() and (colons + 1 < feature_ends).all())
    other_than_digit = np.cumsum((characters < ord("0")) | (characters > ord("9")), dtype=np.int32)
    _require((other_than_digit[colons - 1] == other_than_digit[feature_begins]).all())
    _require(_are_digits(characters[feature_begins]))

    numbers = np.fromstring(text.replace(b":", b" "), sep=" ")  # ValueError for what is no number
    _require(len(numbers) == len(begins) + len(colons))
    label_places = np.flatnonzero(is_label)
    label_places = label_places + np.concatenate([[0], np.cumsum(~is_label)])[label_places]
    of_feature = np.ones(len(numbers), bool)
    of_feature[label_places] = False
    labels, pairs = numbers[label_places], numbers[of_feature].reshape(-1, 2)
    counts = np.diff(np.flatnonzero(np.append(is_label, True))) - 1
    indices = pairs[:, 0]
    with np.errstate(over="ignore"):
        values = pairs[:, 1].astype(np.float32)
    _require(np.isfinite(labels).all() and (labels == np.rint(labels)).all())
    _require((indices >= 1).all() and (indices <= largest).all())
    follows = np.diff(np.repeat(np.arange(len(counts)), counts)) == 0  # the index before is of the same line
    _require((np.diff(indices)[follows] > 0).all())
    _require(np.isfinite(values).all())
    return labels, counts, indices.astype(np.int64) - 1, values


def _are_digits(characters: NDArray[np.uint8]) -> bool:
    return bool(((characters >= ord("0")) & (characters <= ord("9"))).all())


def _require(fine: Any) -> None:
    if not fine:
        raise ValueError


def _first_problem(path: str, first_line: int, text: bytes, largest: int) -> str:
    """What is wrong with the first malformed line of a text that begins with line `first_line` of its
    file."""
    for number, line in enumerate(text.split(b"\n"), first_line):
        if problem := _problem(line.split(), largest):
            return f"{path}, line {number}: {problem}"
    raise AssertionError(f"{path}: refused from line {first_line} on, but no line is malformed")


def _problem(words: list[bytes], largest: int) -> str | None:
    """The same rules as in `_parse_block`, for the words of one line."""
    if not words:
        return None
    label, *features = words
    if not _NUMBER.fullmatch(label) or not float(label).is_integer():
        return f"the label {_shown(label)} is no whole number"
    before = 0
    for feature in features:
        index, colon, value = feature.partition(b":")
        if not (colon and re.fullmatch(rb"[0-9]+", index) and value):
            return f"{_shown(feature)} is not of the form index:value"
        if not before < int(index):
            below = "is below 1, from which LIBSVM counts"
            rule = f"comes after {before}; indices must ascend" if before else below
            return f"index {int(index)} {rule}"
        if int(index) > largest:
            given = (
                f"data.features={largest}" if largest < _LARGEST_INDEX else f"the largest possible, {largest}"
            )
            return f"index {int(index)} is above {given}"
        if not _NUMBER.fullmatch(value) or abs(float(value)) > float(np.finfo(np.float32).max):
            return f"the value of {_shown(feature)} is no finite number"
        before = int(index)
    return None


def _shown(word: bytes) -> str:
    """A byte order mark, or a zero byte, must be seen."""
    return repr(word[:40])[2:-1]
