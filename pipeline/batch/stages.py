"""Stagewise batch warmup, as Nemotron-4 and the baseline of Lau et al. 2024 (section 5) use it."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from pipeline.batch._interface import Planned, StepDone, round_up

if TYPE_CHECKING:
    from pipeline.config import Config


class Schedule(Planned):
    """`batch.sizes[i]` sequences while the run is inside its i-th share `batch.fractions[i]` of the tokens.

    A step takes the size of the stage in which it starts.
    """

    settings = frozenset({"sizes", "fractions", "round_to"})

    def __init__(self, config: Config) -> None:
        assert config.batch.sizes and config.batch.fractions
        self._sizes = config.batch.sizes
        self.multiple = config.batch_multiple
        self.largest = round_up(max(self._sizes), self.multiple)
        total = config.planned_sequences
        self._ends = [round(total * share) for share in accumulate(config.batch.fractions)]

    @classmethod
    def check(cls, config: Config) -> list[str]:
        sizes, fractions = config.batch.sizes, config.batch.fractions
        if not sizes or not fractions:
            return [
                "batch.sizes, batch.fractions: batch.schedule=stages needs both, such as [32, 64] [0.1, 0.9]"
            ]
        problems = []
        if len(sizes) != len(fractions):
            problems.append(
                f"batch.sizes={sizes} batch.fractions={fractions}: {len(sizes)} sizes for "
                f"{len(fractions)} fractions; there must be one fraction for each size"
            )
        if not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
            last = round(1 - sum(fractions[:-1]), 10)
            hint = f"; {[*fractions[:-1], last]} does" if last > 0 else ""
            problems.append(
                f"batch.fractions={fractions}: sum to {sum(fractions):.10g}, they must sum to 1{hint}"
            )
        if min(fractions) <= 0:
            problems.append(f"batch.fractions={fractions}: each must be above 0")
        return problems

    def batch_at(self, done: StepDone) -> float:
        stage = next((i for i, end in enumerate(self._ends) if done.sequences < end), len(self._sizes) - 1)
        return self._sizes[stage]
