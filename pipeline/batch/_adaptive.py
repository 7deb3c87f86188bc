"""What all adaptive schedules share: when to test, averaging, and the guards on a decision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.batch._interface import Decision, Needs, State, StepDone, round_up
from pipeline.parallel import strategy_class

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.gradients.statistics import GradientStatistics

GUARDS = frozenset(
    [
        "size",
        "max_size",
        "round_to",
        "estimator",
        "measured_units",
        "interval",
        "ema",
        "growth_cap",
        "hold_tokens",
        "monotone",
    ]
)


class Adaptive:
    """Turns a demanded batch size into decisions. A schedule says which ratio it demands.

    Numerator and denominator are averaged apart, because the ratio of two noisy numbers is biased and the
    debiased |G|² of one step is often not positive; the ratio is formed of the averages.
    """

    settings = GUARDS

    def __init__(self, config: Config) -> None:
        self.batch = config.batch
        if self.batch.estimator == "microbatch":
            self.needs = Needs("microbatch", self.batch.measured_units)
        else:
            self.needs = Needs("worker")
        self.multiple = config.batch_multiple
        self.first = round_up(self.batch.size, self.multiple)
        # The cap must itself be a multiple: the largest one that does not exceed max_size.
        self.largest = (self.batch.max_size or self.first) // self.multiple * self.multiple

    @staticmethod
    def check(config: Config) -> list[str]:
        batch, micro = config.batch, config.data.micro_batch
        problems = []
        if batch.max_size is None:
            problems.append(
                f"batch.max_size=null: batch.schedule={batch.schedule} needs a cap. "
                f"A usual choice: {16 * batch.size}"
            )
        elif batch.max_size < (first := round_up(batch.size, config.batch_multiple)):
            problems.append(
                f"batch.max_size={batch.max_size}: below the first batch, batch.size={batch.size} rounded up "
                f"to a multiple of {config.batch_multiple}. Nearest: {first}"
            )
        if batch.estimator == "microbatch" and round_up(batch.size, config.batch_multiple) < 2 * micro:
            problems.append(
                f"batch.size={batch.size}: the variance needs two micro-batches of "
                f"data.micro_batch={micro}. Nearest batch.size: {2 * micro}; "
                f"or data.micro_batch={max(1, batch.size // 2)}"
            )
        parallel = config.parallel
        if batch.estimator != "microbatch" and not strategy_class(parallel.strategy).shows_workers(parallel):
            axes = ", ".join(f"{axis} {n}" for axis, n in parallel.mesh.items())
            problems.append(
                f"batch.estimator={batch.estimator}: compares the gradients of data-parallel ranks, which "
                f"parallel={parallel.strategy} ({axes}) does not show. Use batch.estimator=microbatch, "
                f"parallel=ddp, or a parallel.shard of at least 2"
            )
        if batch.estimator != "microbatch" and batch.measured_units is not None:
            problems.append(
                f"batch.measured_units={batch.measured_units}: counts micro-batches; "
                f"batch.estimator={batch.estimator} needs it to be null"
            )
        return problems

    def terms(self, statistics: GradientStatistics) -> tuple[float, float]:
        """Numerator and denominator whose averages give the demanded batch."""
        raise NotImplementedError

    def start(self) -> tuple[State, Decision]:
        return State(self.batch.size), Decision(self.first, self.batch.size, "scheduled", {})

    def wants_statistics(self, state: State, step: int) -> bool:
        # Nothing is left to decide once a batch that never shrinks has reached its cap.
        if self.batch.monotone and state.requested >= self.largest:
            return False
        return step % self.batch.interval == 0

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        numerator, denominator = self.terms(statistics) if statistics else (math.nan, math.nan)
        if math.isnan(numerator) or math.isnan(denominator):
            return state, self._decision(state.requested, "unmeasured", {})
        ema = self.batch.ema
        state = replace(
            state,
            tests=state.tests + 1,
            numerator=ema * state.numerator + (1 - ema) * numerator,
            denominator=ema * state.denominator + (1 - ema) * denominator,
        )
        # Both averages started at 0 and share one correction, so their ratio needs none.
        demanded = _ratio(state.numerator, state.denominator)
        log = {"test/statistic": demanded, "test/threshold": float(done.batch)}
        requested, reason = self._guard(state, done, demanded)
        if requested != state.requested:
            state = replace(state, requested=requested, changed_at_tokens=done.tokens)
        return state, self._decision(requested, reason, log)

    def _guard(self, state: State, done: StepDone, demanded: float) -> tuple[float, str]:
        """(requested size, reason); the test is of the batch that was measured."""
        current, held_since = done.batch, done.tokens - state.changed_at_tokens
        held = held_since < self.batch.hold_tokens
        if demanded <= current:
            if self.batch.monotone or demanded == current or current <= self.first:
                return state.requested, "passed"
            if held:
                return state.requested, "held"
            return max(demanded, current / self.batch.growth_cap, self.first), "shrank"
        if held:
            return state.requested, "held"
        limit = min(current * self.batch.growth_cap, self.largest)
        return (limit, "capped") if demanded > limit else (demanded, "grew")

    def _decision(self, requested: float, reason: str, log: dict[str, float]) -> Decision:
        return Decision(min(round_up(requested, self.multiple), self.largest), requested, reason, log)


def _ratio(numerator: float, denominator: float) -> float:
    """A noise-to-signal ratio: infinite when no signal is left."""
    return max(numerator, 0.0) / denominator if denominator > 0 else math.inf
