"""Which files, which documents, and what is left out of each format."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipeline.config import ConfigError
from pipeline.data import fingerprint
from pipeline.data.sources import Skip, corpus_files, documents, pieces
from tests.data.helpers import settings, texts, write_jsonl

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def read(*files: Path | str, field: str = "text", piece_bytes: int = 2**20) -> list[bytes | Skip]:
    data = settings(*files, field=field)
    return [record for piece in pieces(data, piece_bytes) for record in documents(piece, field)]


def reasons(records: list[bytes | Skip]) -> list[str]:
    return [record.reason if isinstance(record, Skip) else record.decode() for record in records]


# --- files


def test_globs_are_sorted_patterns_keep_their_order_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "z.jsonl", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = corpus_files(settings(tmp_path / "z.jsonl", tmp_path / "**/*.txt", tmp_path / "a.txt"))
    names = [str(Path(path).relative_to(tmp_path)) for path, _ in files]
    assert names == ["z.jsonl", "a.txt", "b.txt", "sub/c.txt"]
    assert [ending for _, ending in files] == [".jsonl", ".txt", ".txt", ".txt"]


def test_a_name_that_looks_like_a_glob_is_a_file_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("x")
    assert reasons(read(tmp_path / "part[1].txt")) == ["x"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("*.jsonl", "matches no file"),
        ("missing.txt", "no such file"),
        ("notes.md", r"unknown ending. Allowed: .txt, .jsonl, .jsonl.gz, .json.gz, .parquet"),
        (".", r"is a directory. Name its files"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ConfigError, match=message):
        fingerprint(settings(tmp_path / name))


def test_no_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one file"):
        fingerprint(settings(source="text"))


def test_the_standard_library_without_tests_and_site_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [str(Path(path).relative_to(root)) for path, _ in corpus_files(settings())]
    assert {"json/decoder.py", "typing.py", "asyncio/events.py", "encodings/utf_8.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__", "idlelib"}
    assert not [name for name in names if left_out & set(Path(name).parts)]
    assert not [name for name in names if "sysconfigdata" in name]
    assert sum((root / name).stat().st_size for name in names) > 7e6


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"no source files.*data=text"):
        fingerprint(settings())


# --- fingerprint


def test_fingerprint_of_the_standard_library_names_the_version() -> None:
    assert fingerprint(settings()) == f"stdlib-{platform.python_version()}"


def test_fingerprint_is_the_documented_hash(tmp_path: Path) -> None:
    contents = [os.urandom(200_000), b"short", b""]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content[: 2**16] + content[-(2**16) :])
    assert fingerprint(settings(tmp_path / "*.txt")) == f"text-{digest.hexdigest()[:16]}"


def test_fingerprint_sees_changes_and_not_places(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "a.jsonl", texts(5))
    here = settings(tmp_path / "here/*.jsonl")
    before = fingerprint(here)
    assert before == fingerprint(settings(tmp_path / "there/a.jsonl"))
    time.sleep(0.01)
    write_jsonl(tmp_path / "here/a.jsonl", texts(5, start=1))  # of the same process, so past the cache
    assert fingerprint(here) != before
    write_jsonl(tmp_path / "here/a.jsonl", texts(5))
    (tmp_path / "here/b.jsonl").write_text("")
    assert fingerprint(here) != before


def test_fingerprint_of_a_huge_file_reads_little(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.truncate(2**40)  # sparse: 1 TiB that takes no space
    started = time.monotonic()
    fingerprint(settings(tmp_path / "huge.jsonl"))
    assert time.monotonic() - started < 1


def test_fingerprint_imports_neither_torch_nor_extras() -> None:
    code = (
        "import sys; from tests.data.helpers import settings; from pipeline.data import fingerprint;"
        "fingerprint(settings());"
        "sys.exit(', '.join({'torch', 'tokenizers', 'pyarrow', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- documents


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("two\nlines — é\r\n".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    assert reasons(read(tmp_path / "*.txt")) == ["two\nlines — é\r\n", "empty", "invalid UTF-8"]


BAD_LINES = [
    (b'{"text": "good", "id": 1}', "good"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (rb'{"text": "\ud800"}', "invalid UTF-8"),
    (rb'{"text": "\ud83d\ude00 pair"}', "\U0001f600 pair"),
    (b'{"text": "cut', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"body": "x"}', "missing field"),
    (b'{"text": null}', "field is not text"),
    (b'{"text": 7}', "field is not text"),
    (b'{"text": ""}', "empty"),
    (b"", "empty"),
    (b'{"text": "last, without newline"}', "last, without newline"),
]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_every_kind_of_bad_line_is_skipped_in_its_place(tmp_path: Path, ending: str) -> None:
    content = b"\n".join(line for line, _ in BAD_LINES)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert reasons(read(path)) == [reason for _, reason in BAD_LINES]


def test_a_missing_field_says_what_there_is(tmp_path: Path) -> None:
    [skip] = read(write_jsonl(tmp_path / "a.jsonl", ["x"], field="body"))
    assert isinstance(skip, Skip) and skip.reason == "missing field" and "'body'" in skip.detail


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lines=st.lists(st.text(alphabet="aé\u2028 \x85", max_size=12), max_size=12),
    newline=st.booleans(),
    piece_bytes=st.integers(1, 80),
)
def test_any_cut_of_a_jsonl_gives_each_line_once(
    tmp_path: Path, lines: list[str], newline: bool, piece_bytes: int
) -> None:
    """Cuts fall inside lines, on newlines and inside characters; documents come in order, once."""
    path = tmp_path / "a.jsonl"
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in lines)
    path.write_bytes((content + "\n" * (newline and bool(lines))).encode())
    expected = [text or "empty" for text in lines] or ["empty"]
    assert reasons(read(path, piece_bytes=piece_bytes)) == expected
    sizes = [piece.size_bytes for piece in pieces(settings(path), piece_bytes)]
    assert sum(sizes) == path.stat().st_size and max(sizes) <= max(piece_bytes, 1)


def test_files_without_records_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert reasons(read(tmp_path / "*")) == ["empty"] * 3


def test_a_cut_off_gz_names_the_file(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"text": "{i}"}}\n' for i in range(1000)).encode())
    for name, content in (("cut", whole[:-100]), ("none", b"plain text\n")):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}.jsonl.gz: cannot be decompressed"):
            read(tmp_path / f"{name}.jsonl.gz")


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_over_several_row_groups(tmp_path: Path, kind: str) -> None:
    wanted: list[str | None] = [*texts(1000), None, ""]
    column = pa.array(wanted)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pa.table({"id": range(len(wanted)), "text": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert len(pieces(settings(tmp_path / "a.parquet"), 2**20)) == 4
    assert reasons(read(tmp_path / "a.parquet")) == [*texts(1000), "missing field", "empty"]


def test_parquet_with_invalid_utf8(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"ok", b"caf\xe9"], pa.binary())}), tmp_path / "a.parquet")
    assert reasons(read(tmp_path / "a.parquet")) == ["ok", "invalid UTF-8"]


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "url": ["y"], "tags": [["z"]]}), tmp_path / "a.parquet")
    with pytest.raises(
        ConfigError, match=r"data.field=texts.*which has text, url, tags. Did you mean text\?"
    ):
        read(tmp_path / "a.parquet", field="texts")
    with pytest.raises(ConfigError, match=r"tags.*list.*not text"):
        read(tmp_path / "a.parquet", field="tags")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_a_missing_extra_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")

    def not_installed(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'crescendo\[data\]'"):
        read(tmp_path / "a.parquet")


def test_fingerprint_tells_tokenizers_apart_by_their_content(tmp_path: Path) -> None:
    """A run reads tokens, not text: another tokenizer is another corpus, the same one elsewhere is not."""
    for name, content in (("a.json", "one"), ("b.json", "two"), ("copy.json", "one")):
        (tmp_path / name).write_text(content)
    prints = {
        name: fingerprint(settings(tokenizer=str(tmp_path / name)))
        for name in ("a.json", "b.json", "copy.json")
    }
    assert prints["a.json"] == prints["copy.json"] != prints["b.json"]
    assert prints["a.json"].startswith(f"{fingerprint(settings())}+")
