"""Tokenises a corpus with several processes, in parts of about equal size, which one of them puts together.

The parts are appended in order as they come: the result does not depend on the number of workers, and it may
be larger than memory. Every so often the files are brought to disk and the journal says how far they reach,
with checksums: a builder that was killed, or lost its network, costs what it did since.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any

from pipeline.config import ConfigError, DataConfig
from pipeline.data.corpus import Report
from pipeline.data.journal import JOURNAL, Journal
from pipeline.data.parts import BUFFER_BYTES, SPLITS, Job, Part, tokenise_part
from pipeline.data.sources import Piece, pieces
from pipeline.data.tokenizers import load, token_type
from pipeline.store import write_atomically

_JOURNAL_INTERVAL_S = 30.0
_PART_BYTES = {"bytes": 2**26, "file": 2**23}  # of text per part: a second to a few of one core's work


def build(data: DataConfig, found: str, tokenizer: str, directory: Path, say: Report, progress: bool) -> None:
    """Builds the corpus beside its place and renames it there. The caller holds the lock. Raises ConfigError
    when no document can be used."""
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
        job = Job(parts, data.field, data.tokenizer, tokenizer, data.validation_fraction)
        report = _tokenise(data, job, partial, say, progress)
        if not report["documents"]:
            raise ConfigError(f"no document can be used: {_skipped(report)}", *report["examples"])
        report = {"fingerprint": found, "tokenizer": tokenizer, **report}
        write_atomically(partial / "report.json", json.dumps(report, indent=1) + "\n")
        shutil.rmtree(parts)
        (partial / JOURNAL).unlink(missing_ok=True)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        if partial.exists() and not (partial / JOURNAL).exists():
            shutil.rmtree(partial)  # nothing to go on from
    say(
        f"corpus {directory.name}: {report['tokens']:,} tokens of {report['documents']:,} documents "
        f"({report['validation_documents']:,} held out) prepared in {time.monotonic() - started:.1f} s; "
        f"{_skipped(report)}"
    )


def _skipped(report: dict[str, Any]) -> str:
    if not report["skipped"]:
        return "nothing skipped"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items())
    return f"skipped: {counts}"


def _tokenise(data: DataConfig, job: Job, directory: Path, say: Report, progress: bool) -> dict[str, Any]:
    """Writes train.bin and validation.bin in `directory`, the rest of them if the journal there says how far
    they are, and returns the report."""
    part_bytes = _PART_BYTES["bytes" if data.tokenizer == "bytes" else "file"]
    parts = list(_grouped(pieces(data, part_bytes), part_bytes))
    tokenizer = load(job.tokenizer, job.tokenizer_content)
    workers = min(data.workers or _cores(), len(parts))
    sizes = [sum(piece.size_bytes for piece in part) for part in parts]
    journal = Journal.read(directory, zlib.crc32(repr(sizes).encode()))
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
                    while block := file.read(BUFFER_BYTES):
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
                done = sum(sizes[: journal.parts])
                rate = (done - sum(sizes[:first])) / (written - started)
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


def _run(job: Job, parts: list[tuple[Piece, ...]], workers: int, first: int) -> Generator[Part, None, None]:
    """The parts from the `first` on, in order, tokenised by so many processes (one: this one)."""
    todo = list(enumerate(parts))[first:]
    if workers == 1:
        yield from (tokenise_part(job, number, part) for number, part in todo)
        return
    # spawn: a forked worker would inherit this process's threads, and its lock beyond its death
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_builder)
    try:
        futures = [executor.submit(tokenise_part, job, number, part) for number, part in todo]
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
