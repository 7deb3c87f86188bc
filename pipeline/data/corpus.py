"""A corpus on disk: tokenised once, then memory-mapped by every run that reads it.

    corpora/<key>/train.bin  validation.bin   tokens, 2 or 4 bytes each, documents one after another
                  report.json                 what was read, held out and skipped
    corpora/<key>.lock                        held by the process that builds it
    corpora/.<key>.partial/                   being built; the next builder goes on from its journal

The key is a hash of everything that decides the tokens, so a directory never changes once it was renamed
into place. Workers tokenise parts of about equal size into files of their own, which the builder appends in
order as they come: the result does not depend on the number of workers, and it may be larger than memory.
Every so often the files are brought to disk and the journal says how far they reach, with checksums: a
builder that was killed, or lost its network, costs what it did since.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError, DataConfig
from pipeline.data.fingerprint import fingerprint
from pipeline.data.sources import Format, Piece, Skip, corpus_files, documents, pieces
from pipeline.data.stream import too_short
from pipeline.data.tokenizers import content_id, load, token_type

FORMAT_VERSION = 1  # raise it when the same text and settings begin to give other files

SPLITS = ("train", "validation")

_JOURNAL_INTERVAL_S = 30.0
_PART_BYTES = {"bytes": 2**26, "file": 2**23}  # of text per part: a second to a few of one core's work
_EXAMPLES_PER_REASON = 10
_BUFFER_BYTES = 2**20

Report = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Tokens of the documents to train on and of those held out, each document with its end token.

    Both are 1-D views of memory-mapped files, uint16 or uint32, in the order of the source.
    """

    train: NDArray[Any]
    validation: NDArray[Any]
    fingerprint: str
    vocab_size: int
    report: dict[str, Any]


def prepare(data: DataConfig, corpora: Path, report: Report | None = None, progress: bool = False) -> Corpus:
    """The corpus of these settings from `corpora`, built there first if need be.

    Any number of processes may ask at once: one builds, the others wait and say so through `report`.
    Raises ConfigError when there is no such text, when it changed since the run was frozen, or when a split
    is shorter than one sequence.
    """
    say = report or (lambda message: None)
    found = fingerprint(data)
    if data.fingerprint not in (None, found):
        raise ConfigError(
            f"data.fingerprint={data.fingerprint}: the corpus changed since the run was frozen, it is now "
            f"{found}. Restore the text ({_remedy(data)}), or start a new run"
        )
    tokenizer = content_id(data.tokenizer)
    directory = Path(corpora) / _key(data, found, tokenizer)
    corpus = _open(directory)
    if corpus is None:
        with _lock(directory, say):
            corpus = _open(directory)  # somebody else may have built it meanwhile
            if corpus is None:
                corpus = _build(data, found, tokenizer, directory, say, progress)
    _check_lengths(corpus, data)
    return corpus


def _remedy(data: DataConfig) -> str:
    if data.source == "stdlib":
        return "run with that Python"
    return f"data.files=[{', '.join(data.files)}]"


def _key(data: DataConfig, found: str, tokenizer: str) -> str:
    """16 hex digits over everything that decides the tokens."""
    formats = None if data.source == "stdlib" else [format for _, format in corpus_files(data)]
    decides = [FORMAT_VERSION, found, formats, tokenizer, data.field, data.validation_fraction]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _check_lengths(corpus: Corpus, data: DataConfig) -> None:
    documents, validation = corpus.report["documents"], corpus.report["validation_documents"]
    problems = [
        *too_short(
            f"the {documents - validation} of {documents} documents to train on have",
            corpus.train,
            data.sequence_length,
            f"more text, a data.validation_fraction below {data.validation_fraction}",
        ),
        *too_short(
            f"the {validation} of {documents} documents held out for validation have",
            corpus.validation,
            data.sequence_length,
            f"more documents, a data.validation_fraction above {data.validation_fraction}",
        ),
    ]
    if problems:
        raise ConfigError(*problems)


def held_out(document: bytes, fraction: float) -> bool:
    """Whether a document is for validation: by its content alone, so that copies stay on one side."""
    digest = hashlib.blake2b(document, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


# --- on disk ---------------------------------------------------------------------------------------------


def _open(directory: Path) -> Corpus | None:
    """The finished corpus there, or None."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        if np.dtype(report["dtype"]).kind != "u":  # such as Python objects, whose addresses would be read
            return None
        splits = {split: _map(directory / f"{split}.bin", report["dtype"]) for split in SPLITS}
        if any(splits[split].size != report[f"{split}_tokens"] for split in SPLITS):
            return None  # a copy or a disk that lost its end
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none there, or damaged
        return None
    return Corpus(**splits, fingerprint=report["fingerprint"], vocab_size=report["vocab_size"], report=report)


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size < np.dtype(dtype).itemsize:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@contextlib.contextmanager
def _lock(directory: Path, say: Report) -> Iterator[None]:
    """Held while the block runs. The kernel drops it when the holder dies, however it dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f"{directory.name}.lock"), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            say(f"corpus {directory.name}: waiting for {holder} to prepare it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


# --- building --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know."""

    directory: Path
    field: str
    tokenizer: str
    tokenizer_content: str
    validation_fraction: float


@dataclass(frozen=True)
class _Skipped:
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
class _Part:
    """What became of a part of the corpus: its files in `directory`, and its counts."""

    directory: Path
    number: int
    size_bytes: int
    documents: Counter[str] = field(default_factory=Counter)  # by split
    tokens: Counter[str] = field(default_factory=Counter)  # by split
    records: Counter[str] = field(default_factory=Counter)  # by path
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: list[_Skipped] = field(default_factory=list)  # the first of each reason

    def file(self, split: str) -> Path:
        return self.directory / f"{self.number}.{split}"


def _build(
    data: DataConfig, found: str, tokenizer: str, directory: Path, say: Report, progress: bool
) -> Corpus:
    """Builds the corpus beside its place and renames it there. The caller holds the lock."""
    shutil.rmtree(directory, ignore_errors=True)  # a damaged corpus
    started = time.monotonic()
    partial = directory.with_name(f".{directory.name}.partial")
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob("parts-*"):  # of a builder that died
        shutil.rmtree(leftover, ignore_errors=True)
    # a name of its own: a worker that outlives its dead builder by a moment writes nowhere that matters
    parts = partial / f"parts-{os.getpid()}-{time.monotonic_ns()}"
    parts.mkdir()
    try:
        job = _Job(parts, data.field, data.tokenizer, tokenizer, data.validation_fraction)
        report = _tokenise(data, job, partial, say, progress)
        if not report["documents"]:
            raise ConfigError(f"no document can be used: {_skipped(report)}", *report["examples"])
        report = {"fingerprint": found, "tokenizer": tokenizer, **report}
        _write_durably(partial / "report.json", json.dumps(report, indent=1) + "\n")
        shutil.rmtree(parts)
        (partial / _JOURNAL).unlink(missing_ok=True)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        if partial.exists() and not (partial / _JOURNAL).exists():
            shutil.rmtree(partial)  # nothing to go on from
    say(
        f"corpus {directory.name}: {report['tokens']:,} tokens of {report['documents']:,} documents "
        f"({report['validation_documents']:,} held out) prepared in {time.monotonic() - started:.1f} s; "
        f"{_skipped(report)}"
    )
    corpus = _open(directory)
    assert corpus is not None
    return corpus


def _skipped(report: dict[str, Any]) -> str:
    if not report["skipped"]:
        return "nothing skipped"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items())
    return f"skipped: {counts}"


def _tokenise(data: DataConfig, job: _Job, directory: Path, say: Report, progress: bool) -> dict[str, Any]:
    """Writes train.bin and validation.bin in `directory`, the rest of them if the journal there says how far
    they are, and returns the report."""
    part_bytes = _PART_BYTES["bytes" if data.tokenizer == "bytes" else "file"]
    parts = list(_grouped(pieces(data, part_bytes), part_bytes))
    tokenizer = load(job.tokenizer, job.tokenizer_content)
    workers = min(data.workers or _cores(), len(parts))
    sizes = [sum(piece.size_bytes for piece in part) for part in parts]
    journal = _Journal.read(directory, zlib.crc32(repr(sizes).encode()))
    if journal.parts:
        say(f"corpus: goes on after part {journal.parts} of {len(parts)}")
    written, started = time.monotonic(), time.monotonic()
    first = journal.parts
    with contextlib.ExitStack() as stack:
        outputs = {split: stack.enter_context(open(directory / f"{split}.bin", "ab")) for split in SPLITS}
        advance = stack.enter_context(_progress(sum(sizes), progress))
        advance(sum(sizes[:first]))
        for part in stack.enter_context(contextlib.closing(_run(job, parts, workers, first))):
            for split, output in outputs.items():
                with open(part.file(split), "rb") as file:
                    while block := file.read(_BUFFER_BYTES):
                        output.write(block)
                        journal.add(split, block)
                part.file(split).unlink()
            journal.totals.add(part)
            journal.parts += 1
            advance(part.size_bytes)
            if time.monotonic() - written > _JOURNAL_INTERVAL_S:
                written = time.monotonic()
                _sync(outputs.values())
                journal.write(directory)
                done, rate = (
                    sum(sizes[: journal.parts]),
                    sum(sizes[first : journal.parts]) / (written - started),
                )
                say(
                    f"corpus: part {journal.parts} of {len(parts)}, {rate / 1e6:.1f} MB/s, "
                    f"about {(sum(sizes) - done) / rate / 60:.0f} min to go"
                )
        _sync(outputs.values())
    return {
        **journal.totals.report(),
        "crc32": journal.crc32,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        "dtype": token_type(tokenizer.vocab_size).str,
    }


def _sync(files: Iterable[IO[bytes]]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


class _Totals:
    """The counts of all parts, added in order."""

    def __init__(self, tree: dict[str, Any] | None = None) -> None:
        tree = tree or {}
        self._documents = Counter(tree.get("documents", {}))
        self._tokens = Counter(tree.get("tokens", {}))
        self._records = Counter(tree.get("records", {}))
        self._skipped = Counter(tree.get("skipped", {}))
        self._examples: dict[str, list[str]] = tree.get("examples", {})

    def tree(self) -> dict[str, Any]:
        """What makes it anew, for JSON."""
        return {name.removeprefix("_"): value for name, value in vars(self).items()}

    def add(self, part: _Part) -> None:
        for example in part.examples:
            shown = self._examples.setdefault(example.skip.reason, [])
            if len(shown) < _EXAMPLES_PER_REASON:
                shown.append(example.describe(self._records[example.path]))
        self._documents.update(part.documents)
        self._tokens.update(part.tokens)
        self._records.update(part.records)
        self._skipped.update(part.skipped)

    def report(self) -> dict[str, Any]:
        return {
            "documents": self._documents.total(),
            "validation_documents": self._documents["validation"],
            "tokens": self._tokens.total(),
            "train_tokens": self._tokens["train"],
            "validation_tokens": self._tokens["validation"],
            "skipped": dict(self._skipped.most_common()),
            "examples": [text for shown in self._examples.values() for text in shown],
        }


_JOURNAL = "journal.json"


@dataclass
class _Journal:
    """How far the files of a corpus that is being built reach."""

    grouping: int  # a checksum of the parts that it counts
    parts: int = 0
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    crc32: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    totals: _Totals = field(default_factory=_Totals)

    @staticmethod
    def read(directory: Path, grouping: int) -> _Journal:
        """The journal there, with the files cut to what it vouches for; a new one if it does not hold."""
        try:
            tree = json.loads((directory / _JOURNAL).read_text(encoding="utf-8"))
            journal = _Journal(**tree | {"totals": _Totals(tree["totals"])})
            if journal.grouping == grouping and all(journal._holds(directory, split) for split in SPLITS):
                for split in SPLITS:
                    os.truncate(directory / f"{split}.bin", journal.sizes[split])
                return journal
        except (OSError, ValueError, TypeError, KeyError):
            pass  # none, or torn
        for name in (_JOURNAL, *(f"{split}.bin" for split in SPLITS)):
            (directory / name).unlink(missing_ok=True)
        return _Journal(grouping)

    def _holds(self, directory: Path, split: str) -> bool:
        left, found = self.sizes[split], 0
        with open(directory / f"{split}.bin", "rb") as file:
            while left and (block := file.read(min(left, _BUFFER_BYTES))):
                found, left = zlib.crc32(block, found), left - len(block)
        return left == 0 and found == self.crc32[split]

    def add(self, split: str, block: bytes) -> None:
        self.sizes[split] += len(block)
        self.crc32[split] = zlib.crc32(block, self.crc32[split])

    def write(self, directory: Path) -> None:
        tree = {**vars(self), "totals": self.totals.tree()}
        _write_durably(directory / f"{_JOURNAL}.new", json.dumps(tree))
        os.replace(directory / f"{_JOURNAL}.new", directory / _JOURNAL)


def _cores() -> int:
    """Those this process may use: a job often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _grouped(corpus: Iterable[Piece], part_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces together until they make `part_bytes`."""
    group: list[Piece] = []
    group_bytes = 0
    for piece in corpus:
        group.append(piece)
        group_bytes += piece.size_bytes
        if group_bytes >= part_bytes:
            yield tuple(group)
            group, group_bytes = [], 0
    if group:
        yield tuple(group)


def _run(job: _Job, parts: list[tuple[Piece, ...]], workers: int, first: int) -> Generator[_Part, None, None]:
    """The parts from the `first` on, in order, tokenised by so many processes (one: this one)."""
    todo = list(enumerate(parts))[first:]
    if workers == 1:
        yield from (_tokenise_part(job, number, part) for number, part in todo)
        return
    # spawn: a forked worker would inherit this process's threads, and its lock beyond its death
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_builder)
    try:
        futures = [executor.submit(_tokenise_part, job, number, part) for number, part in todo]
        for future in futures:
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a tokenising process was killed, perhaps for memory: data.workers={workers // 2} needs half"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_builder() -> None:
    """Makes this worker end with its builder, also when the builder is killed; and at once on Ctrl-C."""
    builder = multiprocessing.parent_process()
    assert builder is not None

    def end_with_builder() -> None:
        builder.join()
        os._exit(1)

    threading.Thread(target=end_with_builder, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _tokenise_part(job: _Job, number: int, part: tuple[Piece, ...]) -> _Part:
    """Writes the tokens of one part to files of its own, in one pass and document by document."""
    tokenizer = load(job.tokenizer, job.tokenizer_content)
    dtype = token_type(tokenizer.vocab_size)
    end = np.array(tokenizer.end_of_document, dtype).tobytes()
    done = _Part(job.directory, number, sum(piece.size_bytes for piece in part))
    with contextlib.ExitStack() as stack:
        outputs = {
            split: stack.enter_context(open(done.file(split), "wb", buffering=_BUFFER_BYTES))
            for split in SPLITS
        }
        for piece in part:
            for document in documents(piece, job.field):
                record = done.records[piece.path]
                done.records[piece.path] += 1
                if isinstance(document, Skip):
                    done.skipped[document.reason] += 1
                    if done.skipped[document.reason] <= _EXAMPLES_PER_REASON:
                        done.examples.append(_Skipped(piece.path, piece.format, record, document))
                    continue
                split = "validation" if held_out(document, job.validation_fraction) else "train"
                tokens = tokenizer.encode(document)
                outputs[split].write(tokens.astype(dtype).data)
                outputs[split].write(end)
                done.documents[split] += 1
                done.tokens[split] += tokens.size + 1
    return done


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _progress(total_bytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Gives the function to call with the bytes just done; a bar on stderr if `shown`."""
    if not shown:
        yield lambda done_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)
