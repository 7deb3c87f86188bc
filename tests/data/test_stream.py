"""The order contract against its definition, and reading ahead."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError
from pipeline.data import Prefetcher, Stream, permute
from tests.data.helpers import at_any_speed, wait_for

PREFETCH = "prefetch"


def corpus(size: int) -> np.ndarray:
    """Tokens that tell their place."""
    return np.arange(size, dtype=np.uint32)


def by_definition(tokens: np.ndarray, length: int, seed: int, first: int, count: int) -> np.ndarray:
    """DESIGN section 2, position by position."""
    n = (len(tokens) - 1) // length
    rows = []
    for k in range(first, first + count):
        i = permute(np.arange(n), n, seed, k // n)[k % n]
        rows.append(tokens[i * length : i * length + length + 1])
    return np.array(rows, dtype=np.int64).reshape(count, length + 1)


CASES = {
    "size": st.integers(9, 200),
    "length": st.integers(1, 8),
    "seed": st.integers(0, 2**32),
    "first": st.integers(0, 500),
}


@at_any_speed
@given(**CASES, count=st.integers(0, 40))
def test_reads_what_the_contract_defines(size: int, length: int, seed: int, first: int, count: int) -> None:
    stream = Stream(corpus(size), length, seed)
    read = stream.read(first, count)
    assert read.dtype == np.int64 and read.shape == (count, length + 1)
    assert np.array_equal(read, by_definition(corpus(size), length, seed, first, count))


@at_any_speed
@given(**CASES, batches=st.lists(st.integers(1, 30), max_size=8), ranks=st.integers(1, 4))
def test_any_partition_reads_the_same(
    size: int, length: int, seed: int, first: int, batches: list[int], ranks: int
) -> None:
    """Batch by batch, each shared by the ranks of a fresh stream, equals one read."""
    whole = Stream(corpus(size), length, seed).read(first, sum(batches))
    parts, position = [np.empty((0, length + 1), np.int64)], first
    for batch in batches:
        cuts = np.linspace(0, batch, ranks + 1).astype(int) + position
        for start, stop in itertools.pairwise(cuts):
            parts.append(Stream(corpus(size), length, seed).read(int(start), int(stop - start)))
        position += batch
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("size", [9, 16, 17, 18, 25, 100])
def test_an_epoch_has_every_target_once(size: int) -> None:
    stream = Stream(corpus(size), 8, seed=5)
    for epoch in range(3):
        n = stream.sequences_per_epoch
        targets = np.sort(stream.read(epoch * n, n)[:, 1:].ravel())
        assert np.array_equal(targets, np.arange(1, n * 8 + 1))
    assert size - 8 < n * 8 + 1 <= size  # no whole sequence is left over


def test_positions_far_into_the_stream() -> None:
    stream = Stream(corpus(1000), 8, seed=5)
    n = stream.sequences_per_epoch
    assert np.array_equal(stream.read(10**12 * n, n), by_definition(corpus(1000), 8, 5, 10**12 * n, n))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_large_tokens_keep_their_value(dtype: type) -> None:
    tokens = np.full(20, np.iinfo(dtype).max, dtype)
    assert Stream(tokens, 4, 0).read(0, 2).min() == np.iinfo(dtype).max


def test_too_short_a_corpus_is_refused_with_the_numbers() -> None:
    assert Stream(corpus(9), 8, 0).sequences_per_epoch == 1
    with pytest.raises(ConfigError, match=r"sequence_length=8.* 9 tokens.*has 8.*sequence_length=7"):
        Stream(corpus(8), 8, 0)


# --- reading ahead


class SlowStream(Stream):
    """Counts its reads, by thread; waits for `gate` in the background, where `readers` are."""

    def __init__(self) -> None:
        super().__init__(corpus(1000), 8, seed=0)
        self.gate = threading.Event()
        self.readers: set[threading.Thread] = set()
        self.background: list[tuple[int, int]] = []
        self.foreground: list[tuple[int, int]] = []
        self.error: Exception | None = None

    def read(self, first: int, count: int) -> np.ndarray:
        if threading.current_thread().name.startswith(PREFETCH):
            self.readers.add(threading.current_thread())
            self.background.append((first, count))
            assert self.gate.wait(10)
            if self.error:
                raise self.error
        else:
            self.foreground.append((first, count))
        return super().read(first, count)


@pytest.fixture
def slow():
    stream = SlowStream()
    prefetcher = Prefetcher(stream)
    yield stream, prefetcher
    stream.gate.set()
    prefetcher.close()


def test_a_requested_read_is_done_ahead_and_once(slow) -> None:
    stream, prefetcher = slow
    stream.gate.set()
    prefetcher.request(0, 4)
    prefetcher.request(0, 4)
    prefetcher.request(4, 4)
    expected = Stream(corpus(1000), 8, seed=0)
    assert np.array_equal(prefetcher.take(0, 4), expected.read(0, 4))
    assert np.array_equal(prefetcher.take(4, 4), expected.read(4, 4))
    assert stream.background == [(0, 4), (4, 4)] and stream.foreground == []
    assert len(stream.readers) == 1


def test_take_waits_for_the_read_it_asked_for(slow) -> None:
    stream, prefetcher = slow
    prefetcher.request(0, 4)
    threading.Timer(0.1, stream.gate.set).start()
    started = time.monotonic()
    assert prefetcher.take(0, 4).shape == (4, 9)
    assert time.monotonic() - started > 0.05 and stream.foreground == []


def test_another_batch_size_is_read_on_the_spot(slow) -> None:
    stream, prefetcher = slow
    prefetcher.request(0, 4)
    expected = Stream(corpus(1000), 8, seed=0).read(0, 6)
    assert np.array_equal(prefetcher.take(0, 6), expected)  # while the background is still stuck
    assert stream.foreground == [(0, 6)]


def test_requests_passed_over_are_dropped_and_later_ones_kept(slow) -> None:
    stream, prefetcher = slow
    for first in (0, 4, 8, 12, 16):
        prefetcher.request(first, 4)
    prefetcher.take(0, 16)  # passes four of them
    stream.gate.set()
    wait_for(lambda: (16, 4) in stream.background)
    assert set(stream.background) <= {(0, 4), (16, 4)}  # at most the one at work was not stopped in time
    prefetcher.take(16, 4)
    assert stream.foreground == [(0, 16)]


def test_requests_never_taken_are_bounded(slow) -> None:
    stream, prefetcher = slow
    for first in range(10_000):
        prefetcher.request(first, 1)
    stream.gate.set()
    wait_for(lambda: (9_999, 1) in stream.background)
    assert len(stream.background) < 50


def test_an_error_in_the_background_is_raised_by_take(slow) -> None:
    stream, prefetcher = slow
    stream.error = OSError("disk gone")
    stream.gate.set()
    prefetcher.request(0, 4)
    with pytest.raises(OSError, match="disk gone"):
        prefetcher.take(0, 4)
    stream.error = None
    prefetcher.request(0, 4)
    assert prefetcher.take(0, 4).shape == (4, 9)  # the thread lives on


def test_close_ends_the_thread_and_what_is_queued(slow) -> None:
    stream, prefetcher = slow
    for first in range(8):
        prefetcher.request(first, 1)
    wait_for(lambda: stream.readers)
    (reader,) = stream.readers
    threading.Timer(0.05, stream.gate.set).start()
    prefetcher.close()
    assert not reader.is_alive()
    assert stream.background == [(0, 1)]
    prefetcher.close()
