"""A part of a corpus: its tokens, in files of their own, and what was counted on the way."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.sources import Format, Piece, Skip, documents
from pipeline.data.tokenizers import load, token_type

SPLITS = ("train", "validation")
EXAMPLES_PER_REASON = 10
BUFFER_BYTES = 2**20


def held_out(document: bytes, fraction: float) -> bool:
    """Whether a document is for validation: by its content alone, so that copies stay on one side."""
    digest = hashlib.blake2b(document, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    directory: Path
    field: str
    tokenizer: str
    tokenizer_content: str
    validation_fraction: float


@dataclass(frozen=True)
class Skipped:
    """A record that was left out: the `record`-th (from 0) of this file in this part."""

    path: str
    format: Format
    record: int
    skip: Skip

    def describe(self, records_before: int) -> str:
        number = records_before + self.record + 1
        where = {".jsonl": "line", ".jsonl.gz": "line", ".parquet": "row"}.get(self.format)
        place = f", {where} {number}" if where else ""
        detail = f" ({self.skip.detail})" if self.skip.detail else ""
        return f"{self.path}{place}: {self.skip.reason}{detail}"


@dataclass
class Part:
    """What became of a part of the corpus: its files in `directory`, and its counts."""

    directory: Path
    number: int
    size_bytes: int
    documents: Counter[str] = field(default_factory=Counter)  # by split
    tokens: Counter[str] = field(default_factory=Counter)  # by split
    records: Counter[str] = field(default_factory=Counter)  # by path
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: list[Skipped] = field(default_factory=list)  # the first of each reason

    def file(self, split: str) -> Path:
        return self.directory / f"{self.number}.{split}"


def tokenise_part(job: Job, number: int, part: tuple[Piece, ...]) -> Part:
    """Writes the tokens of one part to files of its own, in one pass and document by document."""
    tokenizer = load(job.tokenizer, job.tokenizer_content)
    dtype = token_type(tokenizer.vocab_size)
    end = np.array(tokenizer.end_of_document, dtype).tobytes()
    done = Part(job.directory, number, sum(piece.size_bytes for piece in part))
    with contextlib.ExitStack() as stack:
        outputs = {
            split: stack.enter_context(open(done.file(split), "wb", buffering=BUFFER_BYTES))
            for split in SPLITS
        }
        for piece in part:
            for document in documents(piece, job.field):
                record = done.records[piece.path]
                done.records[piece.path] += 1
                if isinstance(document, Skip):
                    done.skipped[document.reason] += 1
                    if done.skipped[document.reason] <= EXAMPLES_PER_REASON:
                        done.examples.append(Skipped(piece.path, piece.format, record, document))
                    continue
                split = "validation" if held_out(document, job.validation_fraction) else "train"
                tokens = tokenizer.encode(document)
                outputs[split].write(tokens.astype(dtype).data)
                outputs[split].write(end)
                done.documents[split] += 1
                done.tokens[split] += tokens.size + 1
    return done
