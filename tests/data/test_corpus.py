"""A corpus on disk: what it holds, what it left out, and several processes that want it at once."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.data import fingerprint, prepare
from pipeline.data.corpus import Corpus
from pipeline.data.parts import held_out
from tests.data.helpers import END, settings, split_documents, texts, wait_for, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def in_order(documents: list[str], validation: bool, fraction: float = 0.2) -> list[bytes]:
    encoded = [text.encode() for text in documents]
    return [text for text in encoded if held_out(text, fraction) == validation]


def both(corpus: Corpus) -> list[bytes]:
    return split_documents(corpus.train) + split_documents(corpus.validation)


def small_parts(monkeypatch: pytest.MonkeyPatch, part_bytes: int = 500) -> None:
    monkeypatch.setattr("pipeline.data.building._PART_BYTES", {"bytes": part_bytes, "file": part_bytes})


# --- what it holds


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_format_gives_its_documents_in_order(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    documents = texts(120)
    for number, start in enumerate(range(0, 120, 40)):
        path, part = tmp_path / f"{number}{ending}", documents[start : start + 40]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        if ending == ".txt":
            for i, text in enumerate(part):
                (tmp_path / f"{start + i:03}.txt").write_text(text)
        elif ending == ".jsonl":
            path.write_bytes(lines)
        elif ending == ".jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        else:
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.table({"text": part}), path, row_group_size=7)
    corpus = prepare(settings(tmp_path / f"*{ending}"), tmp_path / "corpora")
    assert split_documents(corpus.train) == in_order(documents, validation=False)
    assert split_documents(corpus.validation) == in_order(documents, validation=True)
    assert corpus.train.dtype == np.uint16 and corpus.vocab_size == 257
    assert not corpus.train.flags.owndata and not corpus.train.flags.writeable


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    documents = texts(100)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    said: list[str] = []
    corpus = prepare(settings(source), tmp_path / "corpora", said.append)
    report = corpus.report
    assert report["documents"] == 100
    assert report["validation_documents"] == len(in_order(documents, validation=True)) > 0
    assert report["tokens"] == sum(len(text.encode()) + 1 for text in documents)
    assert (report["train_tokens"], report["validation_tokens"]) == (
        corpus.train.size,
        corpus.validation.size,
    )
    assert report["skipped"] == {} and report["end_of_document"] == END
    assert corpus.fingerprint == fingerprint(settings(source))
    [saved] = (tmp_path / "corpora").glob("*/report.json")
    assert json.loads(saved.read_text()) == report
    assert len(said) == 1 and "100 documents" in said[0] and "nothing skipped" in said[0]


def test_the_standard_library(tmp_path: Path) -> None:
    started = time.monotonic()
    corpus = prepare(settings(sequence_length=256, validation_fraction=0.02), tmp_path)
    assert time.monotonic() - started < 10
    assert corpus.train.size > 7e6 and corpus.validation.size > 1e4
    import json.decoder as module

    source = Path(module.__file__).read_bytes()
    assert source in both(corpus)


# --- held out


def test_no_held_out_text_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document is there three times, in two files, and every copy is on one side."""
    small_parts(monkeypatch)
    documents = [f"{i:04} " + "abcdefgh"[i % 8] * 30 + f" {i * 7919:06}" for i in range(300)]
    write_jsonl(tmp_path / "a.jsonl", documents + documents[::-1])
    write_jsonl(tmp_path / "b.jsonl", documents)
    corpus = prepare(settings(tmp_path / "*.jsonl"), tmp_path / "corpora")
    train, validation = corpus.train.tobytes(), corpus.validation
    held = set(split_documents(validation))
    assert 20 < len(held) < 110  # 60 expected
    for document in held:
        tokens = np.frombuffer(document, np.uint8).astype(corpus.train.dtype).tobytes()
        assert tokens not in train
        assert corpus.validation.tobytes().count(tokens) == 3
    assert len(both(corpus)) == 900


def test_the_share_held_out_and_what_decides_it(tmp_path: Path) -> None:
    documents = [text.encode() for text in texts(20_000)]
    for fraction in (0.01, 0.1, 0.5):
        share = np.mean([held_out(text, fraction) for text in documents])
        assert abs(share - fraction) < 5 * np.sqrt(fraction / len(documents))
    few = {text for text in documents if held_out(text, 0.01)}
    assert few <= {text for text in documents if held_out(text, 0.02)}  # growing keeps what was held out


# --- workers, keys, reuse


def files_of(corpora: Path) -> dict[str, bytes]:
    [directory] = [path for path in corpora.iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 3000)
    write_jsonl(tmp_path / "a.jsonl", texts(400))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b"bad\n\n" * 30)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    results = []
    for workers in (1, 2):
        prepare(settings(tmp_path / "[ab].*", workers=workers), tmp_path / str(workers))
        results.append(files_of(tmp_path / str(workers)))
    assert results[0] == results[1]
    assert set(results[0]) == {"train.bin", "validation.bin", "report.json"}


def test_it_is_built_once_and_then_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = settings(write_jsonl(tmp_path / "a.jsonl", texts(50)))
    first = prepare(data, tmp_path / "corpora")
    monkeypatch.setattr("pipeline.data.parts.documents", None)  # no document may be read again
    said: list[str] = []
    started = time.monotonic()
    second = prepare(data, tmp_path / "corpora", said.append)
    assert time.monotonic() - started < 0.5
    assert said == [] and np.array_equal(first.train, second.train) and first.report == second.report


def test_what_decides_the_tokens_has_its_own_directory(tmp_path: Path) -> None:
    documents = texts(50)
    lines = "".join(json.dumps({"text": t, "body": t[::-1]}) + "\n" for t in documents)
    (tmp_path / "a.jsonl").write_text(lines)
    source, corpora = tmp_path / "a.jsonl", tmp_path / "corpora"
    variants = [
        settings(source),
        settings(source, field="body"),
        settings(source, validation_fraction=0.3),
        settings(write_jsonl(tmp_path / "b.jsonl", documents)),
    ]
    (tmp_path / "same.txt").write_text(lines)  # the same bytes as one document, and one more to hold out
    for data in variants:
        prepare(data, corpora)
    same = [settings(source, workers=2), settings(source, seed=3, sequence_length=4, micro_batch=1)]
    for data in same:
        prepare(data, corpora)
    assert len([path for path in corpora.iterdir() if path.is_dir()]) == len(variants)
    with pytest.raises(ConfigError):  # not the corpus of the .jsonl: one document, so one split is empty
        prepare(settings(tmp_path / "same.txt"), corpora)


def test_a_damaged_corpus_is_built_again(tmp_path: Path) -> None:
    data = settings(write_jsonl(tmp_path / "a.jsonl", texts(50)))
    whole = prepare(data, tmp_path / "corpora").train.tolist()
    [train] = (tmp_path / "corpora").glob("*/train.bin")
    for damage in (lambda: os.truncate(train, 100), train.unlink, train.with_name("report.json").unlink):
        damage()
        assert prepare(data, tmp_path / "corpora").train.tolist() == whole


def test_a_corpus_that_changed_since_the_freeze_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(50))
    frozen = fingerprint(settings(source))
    prepare(settings(source, fingerprint=frozen), tmp_path / "corpora")
    write_jsonl(source, texts(51))
    with pytest.raises(ConfigError, match=rf"data.fingerprint={frozen}: the corpus changed .* now text-"):
        prepare(settings(source, fingerprint=frozen), tmp_path / "corpora")
    with pytest.raises(ConfigError, match=r"stdlib-3\.0\.0.*run with that Python"):
        prepare(settings(fingerprint="stdlib-3.0.0"), tmp_path / "corpora")


# --- what is left out


@pytest.mark.parametrize("workers", [1, 2])
def test_skips_are_counted_with_file_and_line(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line numbers are those of the file, although it was read in many pieces."""
    small_parts(monkeypatch, 700 if workers == 1 else 8000)
    lines = [json.dumps({"text": text}).encode() for text in texts(300)]
    lines[122] = b'{"text": "cut'
    lines[255] = b'{"text": "caf\xe9"}'
    lines[256] = b'{"body": "x"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([b"x", *lines]))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    said: list[str] = []
    data = settings(tmp_path / "*.*", workers=workers)
    report = prepare(data, tmp_path / "corpora", said.append).report
    assert report["skipped"] == {"malformed JSON": 3, "invalid UTF-8": 3, "missing field": 2}
    assert report["documents"] == 2 * 297
    found = {(Path(e.split(": ")[0]).name, e.split(": ")[1].split(" (")[0]) for e in report["examples"]}
    assert found == {
        ("a.jsonl, line 123", "malformed JSON"),
        ("b.jsonl, line 1", "malformed JSON"),
        ("b.jsonl, line 124", "malformed JSON"),
        ("a.jsonl, line 256", "invalid UTF-8"),
        ("b.jsonl, line 257", "invalid UTF-8"),
        ("c.txt", "invalid UTF-8"),
        ("a.jsonl, line 257", "missing field"),
        ("b.jsonl, line 258", "missing field"),
    }
    assert "3 malformed JSON, 3 invalid UTF-8, 2 missing field" in said[-1]


def test_examples_are_few_and_counts_are_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    (tmp_path / "b.jsonl").write_text("bad\n" * 5000)
    report = prepare(settings(tmp_path / "*.jsonl"), tmp_path / "corpora").report
    assert report["skipped"] == {"malformed JSON": 5000} and len(report["examples"]) == 10


def test_nothing_usable_is_refused_with_counts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(7), field="body")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no document can be used: skipped: 7 missing field, 1 empty") as e:
        prepare(settings(tmp_path / "*.*"), tmp_path / "corpora")
    assert "a.jsonl, line 1: missing field (no 'text' among 'body')" in str(e.value)
    assert [path.suffix for path in (tmp_path / "corpora").iterdir()] == [".lock"]  # no remains


def test_too_short_a_split_is_refused_with_the_numbers(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(50))
    with pytest.raises(
        ConfigError, match=r"held out for validation have \d+\..*above 0\.2 or data.sequence_len"
    ):
        prepare(settings(source, sequence_length=2000), tmp_path / "corpora")
    with pytest.raises(ConfigError, match="to train on have"):
        prepare(settings(source, sequence_length=10**6), tmp_path / "corpora")
    assert prepare(settings(source), tmp_path / "corpora").train.size > 0  # as short as it is, it was built
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(ConfigError, match=r"of 1 documents .* have 0\. Use"):
        prepare(settings(tmp_path / "one.txt"), tmp_path / "corpora")


def test_a_broken_file_ends_the_build_whoever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    for name in "abcd":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: cannot be decompressed"):
            prepare(settings(tmp_path / "*.gz", workers=workers), tmp_path / "corpora")
        assert [path.suffix for path in (tmp_path / "corpora").iterdir()] == [".lock"]


# --- several processes

BUILDER = """
import sys, time
from pathlib import Path
from pipeline.data import building, parts, prepare
from tests.data.helpers import settings

building._PART_BYTES = {"bytes": 2000, "file": 2000}
source, corpora, workers, gate = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
read = parts.documents

def until_the_gate_opens(piece, field):
    for number, document in enumerate(read(piece, field)):
        while piece.start and number == 3 and not gate.exists():
            time.sleep(0.01)
        yield document

parts.documents = until_the_gate_opens  # a spawned worker runs this file too, so it stops as well

if __name__ == "__main__":
    report = lambda message: print(message, flush=True)
    made = prepare(settings(source, workers=workers), corpora, report)
    print("tokens", made.report["tokens"], flush=True)
"""


def start_builder(tmp_path: Path, source: Path, workers: int, output: Path) -> subprocess.Popen[bytes]:
    """A process that prepares `source` and stops in the midst of it until tmp_path/gate exists."""
    script = tmp_path / "builder.py"
    script.write_text(BUILDER)
    arguments = [source, tmp_path / "corpora", workers, tmp_path / "gate"]
    with open(output, "wb") as file:
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def partial(corpora: Path) -> list[Path]:
    return [path for path in corpora.glob(".*") if path.is_dir()]


def parts_begun(corpora: Path) -> int:
    return sum(
        path.name.endswith(".train") for directory in partial(corpora) for path in directory.rglob("*")
    )


def test_processes_at_once_build_it_once(tmp_path: Path) -> None:
    source, outputs = write_jsonl(tmp_path / "a.jsonl", texts(100)), [tmp_path / f"{i}.out" for i in range(3)]
    builders = [start_builder(tmp_path, source, 1, output) for output in outputs]
    try:
        wait_for(lambda: sum("waiting for" in output.read_text() for output in outputs) == 2)
        (tmp_path / "gate").touch()
        codes = [builder.wait(30) for builder in builders]
    finally:
        for builder in builders:
            builder.kill()
    said = [output.read_text() for output in outputs]
    assert codes == [0, 0, 0], said
    assert sum("prepared in" in text for text in said) == 1
    tokens = sum(len(text.encode()) + 1 for text in texts(100))
    assert all(f"tokens {tokens}" in text for text in said)
    assert not partial(tmp_path / "corpora")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_builder_leaves_nothing_that_matters(tmp_path: Path, workers: int) -> None:
    source, corpora = write_jsonl(tmp_path / "a.jsonl", texts(300)), tmp_path / "corpora"
    builder = start_builder(tmp_path, source, workers, tmp_path / "out")
    try:
        wait_for(lambda: parts_begun(corpora) >= workers)
        helpers = children(builder.pid)
        assert len(helpers) >= workers - 1
    finally:
        builder.kill()
        builder.wait(30)
    assert partial(corpora)
    # the lock is free at once, and the second build is whole
    corpus = prepare(settings(source), corpora)
    assert split_documents(corpus.train) == in_order(texts(300), validation=False)
    assert not partial(corpora)
    wait_for(lambda: not any(alive(pid) for pid in helpers), 5)  # workers end with their builder


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    """40 MB of documents in one file pass through 6 MB of memory, most of it buffers."""
    path, line = tmp_path / f"a{ending}", json.dumps({"text": "#" + "x" * 4000}).encode()
    with gzip.open(path, "wb", 1) if ending.endswith("gz") else open(path, "wb") as file:
        for number in range(10_000):
            file.write(line.replace(b"#", b"%d " % number) + b"\n")
    tracemalloc.start()
    try:
        corpus = prepare(settings(path), tmp_path / "corpora")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.train.size + corpus.validation.size > 4e7
    assert peak_bytes < 6e6
