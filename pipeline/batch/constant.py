"""The same batch throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._interface import Decision, State, StepDone, round_up

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.gradients.statistics import GradientStatistics


class Schedule:
    """`batch.size` sequences in every step, rounded up to a multiple."""

    settings = frozenset({"size", "round_to"})
    needs = None

    def __init__(self, config: Config) -> None:
        size = config.batch.size
        self.largest = round_up(size, config.batch_multiple)
        self._decision = Decision(self.largest, size, "scheduled", {})

    @staticmethod
    def check(config: Config) -> list[str]:
        return []

    def start(self) -> tuple[State, Decision]:
        return State(self._decision.requested), self._decision

    def wants_statistics(self, state: State, step: int) -> bool:
        return False

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        return state, self._decision
