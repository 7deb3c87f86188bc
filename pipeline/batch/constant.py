"""The same batch throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._interface import Planned, StepDone, round_up

if TYPE_CHECKING:
    from pipeline.config import Config


class Schedule(Planned):
    """`batch.size` sequences in every step, rounded up to a multiple."""

    settings = frozenset({"size", "round_to"})

    def __init__(self, config: Config) -> None:
        self._size, self.multiple = config.batch.size, config.batch_multiple
        self.largest = round_up(self._size, self.multiple)

    @classmethod
    def check(cls, config: Config) -> list[str]:
        return []

    def batch_at(self, done: StepDone) -> float:
        return self._size
