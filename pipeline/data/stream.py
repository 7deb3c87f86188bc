"""The order contract: what a run reads depends on (data seed, position) alone.

Position k of the infinite stream is sequence permutation(seed, epoch)[k mod n] with epoch = k div n, n
sequences per epoch. Sequence i is the tokens [i·T, i·T + T + 1): T inputs and, shifted by one, T targets, so
neighbours share one token and every token but the first is a target once per epoch.
No batch size, rank, worker or restart enters, so a larger batch takes more of the same stream.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError
from pipeline.data.permutation import permute

_MAX_AHEAD = 16  # requests; a bound on memory for callers that never take what they asked for


def too_short(what: str, tokens: NDArray[Any], sequence_length: int, remedy: str) -> list[str]:
    """The problem, if `tokens` do not fill one sequence."""
    if tokens.size > sequence_length:
        return []
    shorter = f" or data.sequence_length={tokens.size - 1} at most" if tokens.size > 1 else ""
    return [
        f"data.sequence_length={sequence_length}: one sequence needs {sequence_length + 1} tokens and "
        f"{what} {tokens.size}. Use {remedy}{shorter}"
    ]


class Stream:
    """The infinite stream of `sequence_length` + 1 tokens each, from the tokens [k] of a corpus.

    Raises ConfigError when they do not fill one sequence. Reading changes nothing: any thread may read.
    """

    def __init__(self, tokens: NDArray[Any], sequence_length: int, seed: int) -> None:
        if problems := too_short("the corpus has", tokens, sequence_length, "more text"):
            raise ConfigError(*problems)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)
        self._sequences = windows[::sequence_length]  # a view [n, T + 1]: nothing is read yet
        self._seed = seed

    @property
    def sequences_per_epoch(self) -> int:
        return len(self._sequences)

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Positions first … first + count − 1, as tokens [count, sequence_length + 1]."""
        n = self.sequences_per_epoch
        epochs, indices = np.divmod(np.arange(first, first + count), n)
        sequences: NDArray[Any] = self._sequences[permute(indices, n, self._seed, epochs)]
        return sequences.astype(np.int64)


Read = TypeVar("Read", covariant=True)


class Source(Protocol[Read]):
    """An infinite stream: what is at a position depends on the seed of the data alone. Any thread may
    read."""

    @property
    def sequences_per_epoch(self) -> int: ...

    def read(self, first: int, count: int) -> Read:
        """What is at the positions first … first + count − 1."""
        ...


class Prefetcher(Generic[Read]):
    """Reads requested positions ahead in one background thread.

    Requests name explicit positions, so a batch size may change at any time: what was requested under the old
    size is dropped once the run has passed it, and what was not requested is read on the spot.
    """

    def __init__(self, stream: Source[Read]) -> None:
        self._stream = stream
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[tuple[int, int], Future[Read]] = {}

    def request(self, first: int, count: int) -> None:
        """Begins to read positions first … first + count − 1."""
        if (first, count) in self._ahead:
            return
        if len(self._ahead) == _MAX_AHEAD:
            self._drop(next(iter(self._ahead)))
        self._ahead[first, count] = self._reader.submit(self._stream.read, first, count)

    def take(self, first: int, count: int) -> Read:
        """What is at these positions; raises here what went wrong in the background."""
        future = self._ahead.pop((first, count), None)
        for stale in [key for key in self._ahead if key[0] < first + count]:
            self._drop(stale)
        return self._stream.read(first, count) if future is None else future.result()

    def close(self) -> None:
        """Ends the thread, after the read it is at."""
        self._ahead.clear()
        self._reader.shutdown(cancel_futures=True)

    def _drop(self, request: tuple[int, int]) -> None:
        self._ahead.pop(request).cancel()
