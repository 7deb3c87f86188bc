"""Doubling as the measured critical batch allows: Merrill et al. 2025 (arXiv 2505.23971, section 4).

While the critical batch B*(t), measured by branching from checkpoints (python -m pipeline.critical), is above
2 B, the batch doubles; the learning rate goes along by √2 with `lr.batch_scaling=sqrt`.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from typing import TYPE_CHECKING

from pipeline.batch._caps import cap_below_start, largest_reached
from pipeline.batch._interface import Planned, StepDone

if TYPE_CHECKING:
    from pipeline.config import Config


class Schedule(Planned):
    """b(t) = size · 2^k with the largest k for which B* > 2^k · size at or before t.

    B* runs straight from measurement to measurement (`batch.measured_tokens`, `batch.measured_sizes`); before
    the first nothing is known and nothing grows, after the last it stays.
    """

    settings = frozenset({"size", "max_size", "round_to", "measured_tokens", "measured_sizes"})

    def __init__(self, config: Config) -> None:
        batch = config.batch
        assert batch.measured_tokens and batch.measured_sizes
        self._tokens, self._sizes, self._first = batch.measured_tokens, batch.measured_sizes, batch.size
        self.multiple = config.batch_multiple
        self.largest = largest_reached(config, self.batch_at(StepDone(0, config.budget_tokens, 0, 0)))

    @classmethod
    def check(cls, config: Config) -> list[str]:
        tokens, sizes = config.batch.measured_tokens, config.batch.measured_sizes
        if not tokens or not sizes:
            return [
                "batch.measured_tokens, batch.measured_sizes: batch.schedule=critical needs both, the "
                "critical batch (in sequences) measured after so many tokens. python -m pipeline.critical "
                "measures it"
            ]
        problems = cap_below_start(config)
        if len(tokens) != len(sizes):
            problems.append(
                f"batch.measured_tokens={tokens} batch.measured_sizes={sizes}: {len(sizes)} sizes for "
                f"{len(tokens)} token counts; there must be one for each"
            )
        if any(later <= earlier for earlier, later in itertools.pairwise(tokens)):
            problems.append(f"batch.measured_tokens={tokens}: must increase. Sorted: {sorted(set(tokens))}")
        if min(sizes) <= 0:
            problems.append(f"batch.measured_sizes={sizes}: each must be above 0")
        return problems

    def batch_at(self, done: StepDone) -> float:
        doublings = 0
        if (highest := self._highest(done.tokens)) > self._first:
            doublings = math.ceil(math.log2(highest / self._first)) - 1
        return self._first * 2.0**doublings

    def _highest(self, tokens: int) -> float:
        """The largest B* up to here, in sequences; 0 before the first measurement."""
        known = bisect_right(self._tokens, tokens)
        if known == 0:
            return 0.0
        highest = float(max(self._sizes[:known]))
        if known == len(self._tokens):
            return highest
        (t0, t1), (b0, b1) = self._tokens[known - 1 : known + 1], self._sizes[known - 1 : known + 1]
        return max(highest, b0 + (b1 - b0) * (tokens - t0) / (t1 - t0))
