"""data=c4: files in C4's own format, from a mirror and from a Hub, prepared and resumed by the real command."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.data import hub, prepare
from pipeline.data.fingerprint import fingerprint
from tests.data.helpers import settings, split_documents, texts
from tests.data.hub_server import Files, serving
from tests.support import config

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "607bd4c8450a42878aa9ddc051a65a055450ef87"
SHARDS = f"hf://datasets/allenai/c4@{COMMIT}/en/c4-train.{{00000..00003}}-of-01024.json.gz"


def shard(documents: list[str]) -> bytes:
    """As C4 is published: one JSON object a line, with these three fields."""
    lines = [
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"})
        for text in documents
    ]
    return gzip.compress(("\n".join(lines) + "\n").encode())


def shards() -> Files:
    return {
        f"datasets/allenai/c4/en/c4-train.{i:05}-of-01024.json.gz": shard(texts(200, start=200 * i))
        for i in range(4)
    }


def documents() -> set[bytes]:
    return {text.encode() for text in texts(800)}


def prepared(
    home: Path, address: str, *overrides: str, start: Sequence[str] = ("-m", "pipeline.data")
) -> subprocess.CompletedProcess[str]:
    """python -m pipeline.data, with byte tokens and this Hub."""
    return subprocess.run(
        [sys.executable, *start, "data=c4", f'data.files=["{SHARDS}"]', "data.tokenizer=bytes",
         "data.validation_fraction=0.1", "data.workers=1", *overrides],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CRESCENDO_HOME": str(home),
            "HF_ENDPOINT": address,
            "HF_HOME": str(home / "hub"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip


def corpora(home: Path) -> list[Path]:
    return [path for path in (home / "corpora").iterdir() if path.is_dir()]


def documents_in(corpus: Path) -> list[bytes]:
    splits = [np.fromfile(corpus / f"{split}.bin", "<u2") for split in ("train", "validation")]
    return [document for split in splits for document in split_documents(split)]


def test_a_mirror_of_c4(tmp_path: Path):
    for name, data in shards().items():
        (tmp_path / Path(name).name).write_bytes(data)
    corpus = prepare(settings(tmp_path / "c4-train.*.json.gz"), tmp_path / "corpora")
    found = split_documents(corpus.train) + split_documents(corpus.validation)
    assert len(found) == 800 and set(found) == documents()


def test_the_preset_names_commits_and_asks_nothing_of_the_network():
    """All that a preview needs, offline."""
    composed = config("data=c4", "model=microllama_300m")
    files = [path for pattern in composed.data.files for path in hub.expand(pattern)]
    assert len(files) == 32 and files[31].endswith("/en/c4-train.00031-of-01024.json.gz")
    fewer = config("data=c4", "model=microllama_300m", f'data.files=["{SHARDS}"]')
    assert fingerprint(fewer.data) != fingerprint(composed.data)


def test_from_the_hub(tmp_path: Path):
    with serving(shards()) as (address, requests):
        done = prepared(tmp_path, address)
        assert done.returncode == 0, done.stderr
        asked = len(requests)
        again = prepared(tmp_path, address)
        assert again.returncode == 0 and len(requests) == asked  # nothing is fetched twice
    (corpus,) = corpora(tmp_path)
    found = documents_in(corpus)
    assert len(found) == 800 and set(found) == documents()
    assert "tokens to train on" in done.stdout


def test_a_tokenizer_from_the_hub(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, [], unk_token="<unk>")
    )
    name = f"hf://some/tokenizer@{COMMIT}/tokenizer.json"
    files = {**shards(), "some/tokenizer/tokenizer.json": made.to_str().encode()}
    with serving(files) as (address, _):
        done = prepared(tmp_path, address, f'data.tokenizer="{name}"')
    assert done.returncode == 0, done.stderr
    (corpus,) = corpora(tmp_path)
    report = json.loads((corpus / "report.json").read_text())
    assert (report["vocab_size"], report["end_of_document"]) == (4, 2)


def test_a_lost_network_costs_nothing_that_was_done(tmp_path: Path):
    """The second shard cannot be fetched; the next attempt begins with it, and ends with what a build without
    interruption makes."""
    every_part = ("-c", PATCHED)
    with serving(shards(), broken_after=1) as (address, _):
        broken = prepared(tmp_path, address, start=every_part)
    assert broken.returncode == 2
    assert "the Hub cannot be reached" in broken.stderr and "Traceback" not in broken.stderr
    with serving(shards()) as (address, requests):
        resumed = prepared(tmp_path, address, start=every_part)
    assert resumed.returncode == 0, resumed.stderr
    assert "goes on after part 1 of 4" in resumed.stdout
    assert not [r for r in requests if "resolve" in r and "c4-train.00000" in r]
    with serving(shards()) as (address, _):
        whole = prepared(tmp_path / "whole", address)
    assert whole.returncode == 0
    for name in ("train.bin", "validation.bin", "report.json"):
        assert (corpora(tmp_path)[0] / name).read_bytes() == (
            corpora(tmp_path / "whole")[0] / name
        ).read_bytes()


# One shard a part, and the journal after each.
PATCHED = """
import sys
from pipeline.data import __main__ as command, building
building._PART_BYTES, building._JOURNAL_INTERVAL_S = {"bytes": 1, "file": 1}, 0.0
sys.argv[0] = "pipeline.data"
sys.exit(command.main())
"""


def test_several_processes_read_the_hub_and_say_what_went_wrong(tmp_path: Path):
    every_part = ("-c", PATCHED)
    with serving(shards()) as (address, _):
        done = prepared(tmp_path, address, "data.workers=2", start=every_part)
    assert done.returncode == 0, done.stderr
    assert set(documents_in(corpora(tmp_path)[0])) == documents()
    with serving(shards(), broken_after=1) as (address, _):
        broken = prepared(tmp_path / "broken", address, "data.workers=2", start=every_part)
    assert broken.returncode == 2 and "the Hub cannot be reached" in broken.stderr


@pytest.mark.parametrize("damage", ["shorter", "changed", "torn journal", "none"])
def test_a_journal_is_believed_only_as_far_as_its_files_hold(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, data in shards().items():
        (tmp_path / Path(name).name).write_bytes(data)
    monkeypatch.setattr("pipeline.data.building._PART_BYTES", {"bytes": 1, "file": 1})
    monkeypatch.setattr("pipeline.data.building._JOURNAL_INTERVAL_S", 0.0)
    source, made = settings(tmp_path / "c4-train.*.json.gz"), tmp_path / "corpora"
    interrupted = RuntimeError("lost")
    said: list[str] = []

    def lose_it(message: str) -> None:
        if "part 2 of 4" in message:
            raise interrupted

    with pytest.raises(RuntimeError, match="lost"):
        prepare(source, made, lose_it)
    (partial,) = made.glob(".*.partial")
    train = partial / "train.bin"
    if damage == "shorter":
        os.truncate(train, train.stat().st_size - 1)
    elif damage == "changed":
        data = bytearray(train.read_bytes())
        data[100] ^= 1
        train.write_bytes(data)
    elif damage == "torn journal":
        (partial / "journal.json").write_text('{"grouping": 4, "par')
    else:
        train.write_bytes(train.read_bytes() + b"beyond the journal")
    corpus = prepare(source, made, said.append)
    found = split_documents(corpus.train) + split_documents(corpus.validation)
    assert len(found) == 800 and set(found) == documents()
    assert any("goes on after part 2" in text for text in said) == (damage == "none")
    assert not list(made.glob(".*.partial"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://datasets/allenai/c4/en/x.json.gz", "must name its commit"),
        ("hf://datasets/allenai/c4@main/en/x.json.gz", "must name its commit"),
        (f"hf://datasets/allenai/c4@{COMMIT}/en/*.json.gz", "no globs on the Hub"),
        (f"hf://datasets/allenai/c4@{COMMIT}/en/x.csv", "unknown ending"),
        (
            f"hf://datasets/allenai/c4@{COMMIT}/en/x.{{00003..00001}}.json.gz",
            "from the smaller number to the",
        ),
    ],
)
def test_refuses(path: str, message: str):
    with pytest.raises(ConfigError, match=message):
        fingerprint(settings(path))


def test_without_a_network(tmp_path: Path):
    """Nobody listens at this address: the data and the tokenizer are out of reach, not missing."""
    mirror = tmp_path / "c4-train.00000-of-01024.json.gz"
    mirror.write_bytes(shard(texts(200)))
    remote = f'data.tokenizer="hf://some/tokenizer@{COMMIT}/tokenizer.json"'
    for overrides in ([], [f"data.files=[{mirror}]", remote]):
        done = prepared(tmp_path, "http://127.0.0.1:9", *overrides)
        assert done.returncode == 2
        assert "the Hub cannot be reached" in done.stderr and "python -m pipeline.data" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_file_that_is_not_on_the_hub(tmp_path: Path):
    with serving({}) as (address, _):
        done = prepared(tmp_path, address)
    assert done.returncode == 2
    assert "not on the Hub" in done.stderr and "Traceback" not in done.stderr
