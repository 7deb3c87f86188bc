"""Which sequences of a step are whose: micro-batches, dealt out to the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import Config


class Units:
    """Unit i of a step is always the same sequences of the stream, those of share i mod data ranks. So what
    is learnt, and measured, does not depend on the mesh."""

    def __init__(self, config: Config) -> None:
        self._micro, self._ranks = config.data.micro_batch, config.parallel.data_ranks
        self._shared = config.data.distribution == "shared"

    def of_shares(self, first: int, size: int, shares: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first sequence, sequences) of these shares' units of the sequences [first, first + size). At the
        end of the budget a unit may be short or empty."""
        micro = self._micro
        for round_start in range(0, size, self._ranks * micro):
            for share in shares:
                start = round_start + share * micro
                yield first + start, max(0, min(micro, size - start))

    def first_of_share(self, first: int, share: int) -> tuple[int, int]:
        """The share's first unit of a step that starts at `first`, whatever its batch will be."""
        return first + share * self._micro, self._micro

    def place(self, start: int) -> int:
        """Where a unit that starts at sequence `start` lies in the stream that its rank reads."""
        if self._shared:
            return start
        return start // (self._ranks * self._micro) * self._micro  # the other ranks' are in other streams
