"""LIBSVM files against scikit-learn's own reader, and what is refused against the rules word by word."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from pipeline import samples
from pipeline.config import ConfigError
from pipeline.samples import libsvm
from pipeline.samples._samples import Samples
from tests.samples.support import data


def read(*files: Path, features: int | None = None) -> tuple[Samples, Samples | None]:
    more = [f"data.features={features}"] if features else []
    return libsvm.read(data("libsvm", *more, files=list(files)))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """500 samples of up to 40 features, some with none, values from 1e-20 to 1e20; labels −3, 0 and 7."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(500, 40)) * 10.0 ** rng.integers(-20, 20, (500, 40))
    matrix[rng.random(matrix.shape) < 0.9] = 0
    matrix[17] = 0
    dump_svmlight_file(matrix, rng.choice([-3, 0, 7], 500), str(tmp_path / "sparse"), zero_based=False)
    return tmp_path / "sparse"


@pytest.mark.parametrize("block_bytes", [1, 300, libsvm._BLOCK_BYTES])
def test_reads_what_scikit_learn_reads(block_bytes: int, sparse: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libsvm, "_BLOCK_BYTES", block_bytes)
    found, held_out = read(sparse)
    inputs, labels = load_svmlight_file(str(sparse))
    assert held_out is None and found.classes == 3
    got, of_got = found.at(np.arange(500))
    np.testing.assert_array_equal(got, inputs.toarray().astype(np.float32))
    np.testing.assert_array_equal(np.array([-3, 0, 7])[of_got], labels)
    assert not got[17].any()


def test_comments_queries_blank_lines_and_other_white_space(tmp_path: Path):
    plain = read(written(tmp_path / "plain", "1 1:2 3:4e-1\n-1\n1 2:.5 3:-7.\n"))[0]
    fancy = read(
        written(
            tmp_path / "fancy",
            "# a comment 9:9\n\n  +1 qid:3\t1:2   3:4e-1 # 7:x\r\n\n-1.0 #\n \t \n1.0e0 qid:12 2:+0.5 3:-7.",
        )
    )[0]
    for got, expected in zip(fancy.at(np.arange(3)), plain.at(np.arange(3)), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert plain.at(np.arange(3))[0].tolist() == [[2, 0, np.float32(0.4)], [0, 0, 0], [0, 0.5, -7]]


@pytest.mark.parametrize(
    ("end", "packed"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_packed_files(end: str, packed: Callable[[bytes], bytes], sparse: Path):
    file = sparse.with_name(f"sparse{end}")
    file.write_bytes(packed(sparse.read_bytes()))
    everything = np.arange(500)
    for got, expected in zip(read(file)[0].at(everything), read(sparse)[0].at(everything), strict=True):
        np.testing.assert_array_equal(got, expected)
    file.write_bytes(packed(sparse.read_bytes())[:-20])
    with pytest.raises(ConfigError, match=rf"sparse\{end}: cannot be read"):
        read(file)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["-1", "+1", "-1"], [0, 1, 0]),
        (["0", "1", "1"], [0, 1, 1]),
        (["2", "1", "2"], [1, 0, 1]),
        (["9", "0", "5"], [2, 0, 1]),
        (["10", "9", "-2.0"], [2, 1, 0]),
    ],
)
def test_labels_are_numbered_in_ascending_order(labels: list[str], expected: list[int], tmp_path: Path):
    found, _ = read(written(tmp_path / "file", "".join(f"{label} 1:1\n" for label in labels)))
    assert found.labels.tolist() == expected and found.classes == len(set(expected))


def test_two_files_share_labels_and_width(tmp_path: Path):
    train = written(tmp_path / "train", "5 1:1\n7 2:1\n")
    test = written(tmp_path / "test", "7 4:3\n6 1:1\n7\n")
    found, held_out = read(train, test)
    assert held_out is not None
    assert (found.labels.tolist(), held_out.labels.tolist()) == ([0, 2], [2, 1, 2])
    assert found.shape == held_out.shape == (4,) and found.classes == held_out.classes == 3
    split = samples.read(data("libsvm", files=[train, test]))
    assert split.train is not split.validation and len(split.train_indices) == 2
    assert read(train, test, features=9)[0].shape == (9,)


LARGE = 2**31 - 1
BAD = {  # a line -> what is said of it
    "one 1:1": "the label one is no whole number",
    "1.5 1:1": "the label 1.5 is no whole number",
    "nan 1:1": "the label nan is no whole number",
    "1e400 1:1": "the label 1e400 is no whole number",
    "1:1 2:2": "the label 1:1 is no whole number",
    "1,2 1:1": "the label 1,2 is no whole number",
    "1 7": "7 is not of the form index:value",
    "1 1:": "1: is not of the form index:value",
    "1 :1": ":1 is not of the form index:value",
    "1 1 : 1": "1 is not of the form index:value",
    "1 1:2:3": "the value of 1:2:3 is no finite number",
    "1 x:2": "x:2 is not of the form index:value",
    "1 1.0:2": "1.0:2 is not of the form index:value",
    "1 -1:2": "-1:2 is not of the form index:value",
    "1 qid:x 1:1": "qid:x is not of the form index:value",
    "1 1:1 qid:2": "qid:2 is not of the form index:value",
    "1 0:2": "index 0 is below 1, from which LIBSVM counts",
    "1 2:1 2:1": "index 2 comes after 2; indices must ascend",
    "1 3:1 2:1": "index 2 comes after 3; indices must ascend",
    f"1 {LARGE + 1}:1": f"index {LARGE + 1} is above the largest possible, {LARGE}",
    f"1 {10**30}:1": f"index {10**30} is above the largest possible, {LARGE}",
    "1 1:nan": "the value of 1:nan is no finite number",
    "1 1:-inf": "the value of 1:-inf is no finite number",
    "1 1:1e39": "the value of 1:1e39 is no finite number",
    "1 1:3-4": "the value of 1:3-4 is no finite number",
    "1 1:1_0": "the value of 1:1_0 is no finite number",
    "1 1:0x10": "the value of 1:0x10 is no finite number",
    "1 1:a": "the value of 1:a is no finite number",
    "\ufeff1 1:1": r"the label \xef\xbb\xbf1 is no whole number",
    "1 1:\0": r"the value of 1:\x00 is no finite number",
}


@pytest.mark.parametrize("block_bytes", [64, libsvm._BLOCK_BYTES])
@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(line: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libsvm, "_BLOCK_BYTES", block_bytes)
    good = "1 1:1 # 1:1\n\n-1 2:1\n" * 40
    file = written(tmp_path / "file", f"{good}{line}\n{good}x y z\n")
    with pytest.raises(ConfigError) as raised:
        read(file)
    assert str(raised.value) == f"{file}, line 121: {BAD[line]}"


def test_an_index_above_data_features_is_named(tmp_path: Path):
    file = written(tmp_path / "file", "1 1:1\n-1 5:1\n")
    with pytest.raises(ConfigError, match=r"file, line 2: index 5 is above data\.features=4"):
        read(file, features=4)


WORDS = st.sampled_from(
    ["1", "-1", "+2", "3.0", "0.5", "1:1", "2:.5", "3:-1e3", "4:7.", "10:0", "0:1", "1:", ":1", ":", "1:1:1", "x", "1:x",
     "2:nan", "2:inf", "5:1e39", "1e5:1", "1:1e", "1:--1", "1:1-1", "6:+", "1.5:2", "2:5e-400", "07:1", "é:1", "1:\x00"]
)  # fmt: skip


@settings(max_examples=400)
@given(
    st.lists(st.lists(WORDS, max_size=4).map(" ".join), max_size=4).map("\n".join)
    | st.text("01.e-+: \n\t", max_size=12)
)
def test_the_fast_parser_refuses_what_the_rules_refuse(text: str):
    content = text.encode()
    malformed = any(libsvm._problem(line.split(), 100) for line in content.split(b"\n"))
    try:
        libsvm._parse_block(content, 100)
    except ValueError:
        assert malformed
    else:
        assert not malformed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no samples"),
        ("# nothing\n\n", "has no samples"),
        ("3 1:1\n3 2:1\n", "all labels are 3; at least two"),
    ],
)
def test_files_without_two_classes(content: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path / "file", content))


def test_missing_files_and_where_they_are_published(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=re.escape(f"no file {tmp_path}/a9a. The data set: {libsvm.PUBLISHED}")
    ):
        samples.fingerprint(data("libsvm", files=[tmp_path / "a9a"]))
    for files in ([], [tmp_path / name for name in "abc"]):
        with pytest.raises(ConfigError, match=rf"data=libsvm needs one file, or two.*{libsvm.PUBLISHED}"):
            data("libsvm", files=files)


def test_the_fingerprint_is_of_the_content(sparse: Path):
    before = samples.fingerprint(data("libsvm", files=[sparse]))
    moved = sparse.rename(sparse.with_name("moved"))
    assert samples.fingerprint(data("libsvm", files=[moved])) == before
    moved.write_text(moved.read_text().replace("7", "8"))
    assert samples.fingerprint(data("libsvm", files=[moved])) != before
    assert re.fullmatch(r"libsvm-[0-9a-f]{16}", before)
