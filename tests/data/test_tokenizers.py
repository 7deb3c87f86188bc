"""Bytes, and a tokenizer.json made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.data import prepare
from pipeline.data.tokenizers import ByteTokenizer, FileTokenizer, content_id, token_type
from tests.data.helpers import settings, texts, write_jsonl

tokenizers = pytest.importorskip("tokenizers")

END_NAME = "<|endoftext|>"


def build(path: Path, end: str | None = END_NAME, vocabulary: int = 400) -> Path:
    """A byte-level BPE tokenizer, in which any text survives the way there and back."""
    levels = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = levels(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end] if end else [],
        initial_alphabet=levels.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(200), trainer)
    made.save(str(path))
    return path


def test_bytes_are_their_own_tokens() -> None:
    assert ByteTokenizer().encode(b"\x00a\xff").tolist() == [0, 97, 255]
    assert (ByteTokenizer().end_of_document, ByteTokenizer().vocab_size) == (256, 257)


@pytest.mark.parametrize(("vocab", "itemsize"), [(257, 2), (65535, 2), (65536, 4), (128_256, 4)])
def test_the_type_on_disk_holds_the_vocabulary(vocab: int, itemsize: int) -> None:
    assert token_type(vocab).itemsize == itemsize
    assert np.iinfo(token_type(vocab)).max >= vocab - 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_decodes_to_its_documents(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.building._PART_BYTES", {"file": 4000})
    path = build(tmp_path / "tokenizer.json")
    wanted = [*texts(150), f"the name {END_NAME} inside a document", "  spaces  "]
    source = write_jsonl(tmp_path / "a.jsonl", wanted)
    corpus = prepare(settings(source, tokenizer=str(path), workers=workers), tmp_path / "corpora")

    judge = tokenizers.Tokenizer.from_file(str(path))
    end = judge.token_to_id(END_NAME)
    assert corpus.vocab_size == judge.get_vocab_size() == 400
    found = []
    for tokens in (corpus.train, corpus.validation):
        assert tokens.dtype == np.uint16 and tokens[-1] == end
        pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
        found += [judge.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]
    assert sorted(found) == sorted(wanted)


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(tmp_path: Path) -> None:
    path = build(tmp_path / "tokenizer.json")
    text = "word " * 100
    whole = FileTokenizer(str(path)).encode(text.encode())
    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(5)
    made.enable_padding(length=1000)
    made.save(str(path))
    assert FileTokenizer(str(path)).encode(text.encode()).tolist() == whole.tolist()
    assert 5 < whole.size < 1000


@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "[EOS]"])
def test_the_end_of_a_document_by_its_usual_names(tmp_path: Path, name: str) -> None:
    path = build(tmp_path / "tokenizer.json", end=name)
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    assert FileTokenizer(str(path)).end_of_document == vocabulary[name]


def test_the_vocabulary_counts_gaps(tmp_path: Path) -> None:
    """Ids decide the size of the embedding, not their number."""
    path = build(tmp_path / "tokenizer.json")
    tree = json.loads(path.read_text())
    tree["added_tokens"].append(
        {**tree["added_tokens"][0], "id": 70_000, "content": "<far>"},
    )
    tree["model"]["vocab"]["<far>"] = 70_000
    path.write_text(json.dumps(tree))
    assert FileTokenizer(str(path)).vocab_size == 70_001


def test_without_an_end_of_document_it_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "tokenizer.json", end=None)
    with pytest.raises(ConfigError, match=r"none of its \d+ tokens marks the end.*</s>"):
        FileTokenizer(str(path))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"broken.json: is no tokenizer.json"):
        FileTokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(ConfigError, match=r"data.tokenizer=gpt2: no such file. Allowed: bytes"):
        content_id("gpt2")
    with pytest.raises(ConfigError, match=rf"is a directory. Nearest: {tmp_path}/tokenizer.json"):
        content_id(str(tmp_path))


def test_a_tokenizer_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    build(first)
    second.write_bytes(first.read_bytes())
    assert content_id(str(first)) == content_id(str(second))
    corpora, source = tmp_path / "corpora", write_jsonl(tmp_path / "a.jsonl", texts(60))
    prepare(settings(source, tokenizer=str(first)), corpora)
    before = prepare(settings(source, tokenizer=str(second)), corpora).train
    build(second, vocabulary=300)
    after = prepare(settings(source, tokenizer=str(second)), corpora)
    assert after.vocab_size == 300 and after.train.size > before.size
