"""A linear ramp over the first tokens, as GPT-3's from 32k to 3.2M (Brown et al. 2020, section 2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._caps import cap_below_start, largest_below
from pipeline.batch._interface import Planned, StepDone

if TYPE_CHECKING:
    from pipeline.config import Config


class Schedule(Planned):
    """b(t) = size + (max_size − size) · min(1, t / ramp_tokens) sequences after t tokens."""

    settings = frozenset({"size", "max_size", "ramp_tokens", "round_to"})

    def __init__(self, config: Config) -> None:
        batch = config.batch
        assert batch.max_size and batch.ramp_tokens
        self._first, self._last, self._ramp_tokens = batch.size, batch.max_size, batch.ramp_tokens
        self.multiple, self.largest = config.batch_multiple, largest_below(config)

    @classmethod
    def check(cls, config: Config) -> list[str]:
        batch, problems = config.batch, cap_below_start(config)
        if batch.max_size is None:
            problems.append("batch.max_size=null: batch.schedule=linear needs the size that it ends with")
        if not batch.ramp_tokens:
            problems.append(
                f"batch.ramp_tokens={batch.ramp_tokens or 'null'}: batch.schedule=linear needs the tokens in "
                f"which it grows. A tenth of the budget: {config.budget.tokens // 10}"
            )
        return problems

    def batch_at(self, done: StepDone) -> float:
        return self._first + (self._last - self._first) * min(1.0, done.tokens / self._ramp_tokens)
