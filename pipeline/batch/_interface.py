"""What every batch schedule is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.gradients.statistics import GradientStatistics


@dataclass(frozen=True)
class State:
    """What a schedule remembers between steps; plain numbers, so that a checkpoint holds them exactly."""

    requested: float  # sequences, before rounding and the cap
    tests: int = 0  # tested steps so far
    numerator: float = 0.0  # exponential averages, not yet corrected for their start at 0
    denominator: float = 0.0
    changed_at_tokens: int = 0  # tokens seen when the batch last changed


@dataclass(frozen=True)
class StepDone:
    """Where a run stands after an optimizer step."""

    step: int  # optimizer steps done
    tokens: int
    sequences: int
    batch: int  # sequences of that step


@dataclass(frozen=True)
class Decision:
    """The batch of the next step."""

    size: int  # sequences: requested, rounded up to a multiple, capped
    requested: float
    reason: str  # passed | grew | capped | held | shrank | scheduled | unmeasured
    log: dict[str, float]  # what the test computed, by metric name


@dataclass(frozen=True)
class Needs:
    """The gradient statistics that a schedule decides from."""

    units: Literal["microbatch", "worker"]  # whose gradients are compared
    measured_units: int | None = None  # microbatch: the first so many of a step; None: all
    direction: Literal["momentum", "previous"] | None = None  # microbatch: products ⟨g_j, d⟩ with it
    coordinates: bool = False  # worker: the variance of every coordinate


class BatchSchedule(Protocol):
    """One schedule. Pure: the same state, step and statistics always give the same decision."""

    settings: ClassVar[frozenset[str]]  # the batch.* settings that can change its decisions
    needs: Needs | None  # None: it never wants statistics, and nothing is installed to take them
    largest: int  # sequences: no decision is above this

    def __init__(self, config: Config) -> None: ...

    @staticmethod
    def check(config: Config) -> list[str]:
        """Problems of a config with this schedule, for the user; empty when it can run."""
        ...

    def start(self) -> tuple[State, Decision]:
        """The state before the first step and the batch of that step."""
        ...

    def wants_statistics(self, state: State, step: int) -> bool:
        """Whether step `step` (counted from 1) is to be measured."""
        ...

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        """The batch of the step after `done`. `statistics` are of the step just done."""
        ...


def round_up(size: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size` and at least one multiple."""
    return max(1, -int(-size // multiple)) * multiple


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run, as far as its config decides them. In sequences."""

    sizes: list[int] | None  # of every step, the last cut to the budget; None: measurements decide
    first: int
    largest: int


def plan(config: Config) -> BatchPlan:
    from pipeline.batch import schedule_class

    schedule = schedule_class(config.batch.schedule)(config)
    state, decision = schedule.start()
    first = decision.size
    if schedule.needs:
        return BatchPlan(None, first, schedule.largest)
    sizes: list[int] = []
    seen, length = 0, config.data.sequence_length
    while seen < config.budget_sequences:
        size = min(decision.size, config.budget_sequences - seen)
        sizes.append(size)
        seen += size
        state, decision = schedule.decide(state, StepDone(len(sizes), seen * length, seen, size), None)
    return BatchPlan(sizes, first, schedule.largest)
