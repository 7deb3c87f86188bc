"""What every batch schedule is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.gradients.statistics import GradientStatistics


@dataclass(frozen=True)
class State:
    """What a schedule remembers between steps; plain numbers, so that a checkpoint holds them exactly."""

    requested: float  # sequences, before rounding and the cap
    tests: int = 0  # tested steps so far
    averages: tuple[float, ...] = ()  # exponential, of what it measures; they started at 0
    demands: tuple[float, ...] = ()  # of the tests since the last decision, where several make one
    changed_at_tokens: int = 0  # tokens seen when the batch last changed

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> State:
        """From the lists that JSON makes of tuples."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
        return State(**values)


@dataclass(frozen=True)
class StepDone:
    """Where a run stands after an optimizer step."""

    step: int  # optimizer steps done
    tokens: int
    sequences: int
    batch: int  # sequences of that step


Reason = Literal["scheduled", "unmeasured", "passed", "grew", "shrank", "capped", "held", "rounded"]


@dataclass(frozen=True)
class Decision:
    """The batch of the next step.

    `reason`: `scheduled` by the config alone. By a measurement: `passed` (the batch is large enough and
    stays), `grew` or `shrank` to the demand, `capped` (grew less than demanded, by `growth_cap` or up to
    `max_size`), `held` (a guard keeps the batch), `rounded` (the demand moved, but not to another multiple).
    `unmeasured`: no statistics of this step.
    """

    size: int  # sequences: requested, rounded up to a multiple, capped
    requested: float
    reason: Reason
    log: dict[str, float]  # what the test computed, by metric name


@dataclass(frozen=True)
class Needs:
    """The gradient statistics that a schedule decides from."""

    units: Literal["microbatch", "worker", "sample"]  # whose gradients are compared
    measured_units: int | None = None  # microbatch: the first so many of a step; None: all
    # Products ⟨g_j, d⟩ with it; in_sample and step: of samples alone (workers have all products of theirs).
    direction: Literal["momentum", "previous", "in_sample", "step"] | None = None
    coordinates: bool = False  # worker, sample: the variance of every coordinate
    redraws: bool = False  # statistics of the step it would take, which may take more samples first


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

    def wants_statistics(self, state: State, step: int, tokens: int) -> bool:
        """Whether step `step` (counted from 1), which starts at `tokens`, is to be measured."""
        ...

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        """The batch of the step after `done`. `statistics` are of the step just done."""
        ...


class Redrawing(BatchSchedule, Protocol):
    """One that needs `redraws`: asked before a measured step is taken, whether its batch may stay."""

    def redraw(self, batch: int, left: int, statistics: GradientStatistics) -> Decision:
        """The batch of the step itself, of which `batch` sequences were measured and `left` are left in the
        budget: the same, or a larger one that begins with them."""
        ...


class Planned:
    """A schedule that the config decides alone. A subclass says which batch a step asks for."""

    needs = None
    largest: int
    multiple: int

    def batch_at(self, done: StepDone) -> float:
        """The batch asked for after `done`, in sequences."""
        raise NotImplementedError

    def start(self) -> tuple[State, Decision]:
        return self._to(self.batch_at(StepDone(0, 0, 0, 0)))

    def wants_statistics(self, state: State, step: int, tokens: int) -> bool:
        return False

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        return self._to(self.batch_at(done))

    def _to(self, requested: float) -> tuple[State, Decision]:
        size = min(round_up(requested, self.multiple), self.largest)
        return State(requested), Decision(size, requested, "scheduled", {})


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
    """The batch of every step where the config decides it, else the first and the largest."""
    from pipeline.batch import schedule_class

    schedule = schedule_class(config.batch.schedule)(config)
    state, decision = schedule.start()
    first = decision.size
    if schedule.needs:
        return BatchPlan(None, first, schedule.largest)
    sizes: list[int] = []
    seen, length = config.first_sequence, config.data.sequence_length
    if seen:
        state, decision = schedule.decide(state, StepDone(0, seen * length, seen, 0), None)
    while seen < config.budget_sequences:
        size = min(decision.size, config.budget_sequences - seen)
        sizes.append(size)
        seen += size
        state, decision = schedule.decide(state, StepDone(len(sizes), seen * length, seen, size), None)
    return BatchPlan(sizes, first, schedule.largest)
