"""Text to tokens: bytes, or a Hugging Face tokenizer.json, here or on the Hub."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.config import BYTE_VOCABULARY, ConfigError
from pipeline.data import hub
from pipeline.data.extra import require

# What tokenizers call the end of a document, in the order in which we look for it
END_OF_DOCUMENT_NAMES = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>"),
    "<｜end▁of▁sentence｜>",
)


class Tokenizer(Protocol):
    """Tokens are in [0, vocab_size); `end_of_document` follows each document."""

    vocab_size: int
    end_of_document: int

    def encode(self, document: bytes) -> NDArray[Any]:
        """The tokens [k] of UTF-8 text, without end_of_document."""


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type on disk that holds every token; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


def content_id(name: str) -> str:
    """What `data.tokenizer` stands for, wherever its file lies: "bytes" or the hash of the file (of a file on
    the Hub: of its name, which holds its commit)."""
    if hub.is_remote(name):
        return hashlib.sha256("".join(hub.expand(name, "data.tokenizer")).encode()).hexdigest()
    return name if name == "bytes" else hashlib.sha256(_read(name)).hexdigest()


@functools.lru_cache(maxsize=1)
def load(name: str, content: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`; `content` is its content_id (the cache must see a changed file)."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


def _read(name: str) -> bytes:
    if hub.is_remote(name):
        return hub.download(name).read_bytes()
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"data.tokenizer={name}: is a directory. Nearest: {path / 'tokenizer.json'}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"data.tokenizer={name}: no such file. Allowed: bytes, or the path of a tokenizer.json"
        ) from None


class ByteTokenizer:
    """Each byte is its own token; 256 ends a document."""

    vocab_size = BYTE_VOCABULARY
    end_of_document = 256

    def encode(self, document: bytes) -> NDArray[Any]:
        return np.frombuffer(document, dtype=np.uint8)


class FileTokenizer:
    """A tokenizer.json. Raises ConfigError when it is none or names no end of a document."""

    def __init__(self, path: str) -> None:
        tokenizers = require("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(_read(path))
        except ValueError as error:
            raise ConfigError(f"data.tokenizer={path}: is no tokenizer.json: {error}") from error
        # A tokenizer.json may ask to cut or pad every text, and would turn a special token's name inside
        # a document into that token.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = [name for name in END_OF_DOCUMENT_NAMES if name in vocabulary]
        if not names:
            raise ConfigError(
                f"data.tokenizer={path}: none of its {len(vocabulary)} tokens marks the end of a document. "
                f"Add one of {', '.join(END_OF_DOCUMENT_NAMES)} as a special token"
            )
        self.end_of_document = int(vocabulary[names[0]])
        self.vocab_size = max(vocabulary.values()) + 1  # the ids of a vocabulary may have gaps

    def encode(self, document: bytes) -> NDArray[Any]:
        # the batch form is 4 times as fast: it does not track where in the text each token came from
        [encoding] = self._tokenizer.encode_batch_fast([document.decode()], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)
