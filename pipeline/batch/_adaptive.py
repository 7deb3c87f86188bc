"""What all adaptive schedules share: when to test, averaging, and the guards on a decision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.batch._caps import cap_below_start, first_batch, largest_below
from pipeline.batch._interface import Decision, Needs, Reason, State, StepDone, round_up
from pipeline.parallel import strategy_class

if TYPE_CHECKING:
    from pipeline.config import BatchConfig, Config
    from pipeline.gradients.statistics import GradientStatistics

GUARDS = frozenset(
    [
        "size",
        "max_size",
        "round_to",
        "measured_units",
        "interval",
        "start_tokens",
        "ema",
        "confirmations",
        "growth_cap",
        "hold_tokens",
        "monotone",
    ]
)
AVERAGING = frozenset(["averaged_steps", "averaged_ratio"])


class Adaptive:
    """Turns a demanded batch size into decisions. A schedule says what it measures and what that demands.

    What is measured in single steps is averaged before anything is divided: the ratio of two noisy numbers
    is biased, and the debiased |G|² of one step is often not positive.
    """

    settings = GUARDS

    def __init__(self, config: Config) -> None:
        self.batch = config.batch
        self.needs = self.needs_of(config.batch)
        self.multiple = config.batch_multiple
        self.first, self.largest = first_batch(config), largest_below(config)

    @property
    def never_shrinks(self) -> bool:
        return self.batch.monotone

    @classmethod
    def needs_of(cls, batch: BatchConfig) -> Needs:
        if batch.estimator == "microbatch":
            return Needs("microbatch", batch.measured_units)
        return Needs("sample" if batch.estimator == "sample" else "worker")

    @classmethod
    def compares_by(cls, batch: BatchConfig) -> tuple[str, str]:
        """The setting of the batch group that has ranks compared, and its value that does without."""
        return "estimator", "microbatch"

    @classmethod
    def check(cls, config: Config) -> list[str]:
        batch, problems = config.batch, cap_below_start(config)
        if batch.max_size is None:
            problems.append(
                f"batch.max_size=null: batch.schedule={batch.schedule} needs a cap. "
                f"A usual choice: {16 * batch.size}"
            )
        needs = cls.needs_of(batch)
        if needs.direction and needs.measured_units == 1:
            problems.append(
                f"batch.measured_units=1: the variance along batch.direction={batch.direction} needs two "
                f"micro-batches. Nearest: 2"
            )
        if needs.units == "microbatch":
            problems += _check_two_micro_batches(config)
        elif needs.units == "sample":
            problems += [*_check_two_samples(config), *check_shows_samples(config)]
        else:
            problems += cls._check_workers(config)
        return problems

    @classmethod
    def _check_workers(cls, config: Config) -> list[str]:
        batch, parallel, problems = config.batch, config.parallel, []
        by, instead = cls.compares_by(batch)
        chosen = f"batch.{by}={getattr(batch, by)}"
        if not strategy_class(parallel.strategy).shows_workers(parallel):
            axes = ", ".join(f"{axis} {n}" for axis, n in parallel.mesh.items())
            problems.append(
                f"{chosen}: compares the gradients of data-parallel ranks, which "
                f"parallel={parallel.strategy} ({axes}) does not show. Use parallel=ddp, a parallel.shard of "
                f"at least 2, or batch.{by}={instead}; with labelled samples also batch.estimator=sample"
            )
        if batch.measured_units is not None:
            problems.append(
                f"batch.measured_units={batch.measured_units}: counts micro-batches; {chosen} needs it to "
                f"be null"
            )
        return problems

    def terms(self, statistics: GradientStatistics) -> tuple[float, ...]:
        """What is averaged, of one step. NaN: not measurable in this one."""
        raise NotImplementedError

    def demand(self, averages: tuple[float, ...]) -> float:
        """The batch in sequences that the averaged terms ask for."""
        raise NotImplementedError

    def extra_log(self, averages: tuple[float, ...], batch: int) -> dict[str, float]:
        """What is logged beside the demand, after a step with this batch."""
        return {}

    def start(self) -> tuple[State, Decision]:
        return State(self.batch.size), Decision(self.first, self.batch.size, "scheduled", {})

    def wants_statistics(self, state: State, step: int, tokens: int) -> bool:
        # Nothing is left to decide once a batch that never shrinks has reached its cap, if only by rounding.
        if self.never_shrinks and round_up(state.requested, self.multiple) >= self.largest:
            return False
        return step % self.batch.interval == 0 and tokens >= self.batch.start_tokens

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        terms = self.terms(statistics) if statistics else (math.nan,)
        if any(math.isnan(term) for term in terms):
            return state, self._decision(state.requested, "unmeasured", {})
        state = self._averaged(state, terms)
        # Averages that started at 0 share one correction.
        started = 1 - self.batch.ema**state.tests
        averages = tuple(average / started for average in state.averages)
        demanded = self.demand(averages)
        log = {"test/statistic": demanded, "test/threshold": float(done.batch)}
        log |= self.extra_log(averages, done.batch)

        demands = (*state.demands, demanded)
        if len(demands) < self.batch.confirmations:
            return replace(state, demands=demands), self._decision(state.requested, "held", log)
        requested, reason = self._guard(state, done, _agreed(demands, done.batch))
        changed_at = done.tokens if requested != state.requested else state.changed_at_tokens
        state = replace(state, requested=requested, demands=(), changed_at_tokens=changed_at)
        return state, self._decision(requested, reason, log)

    def _averaged(self, state: State, terms: tuple[float, ...]) -> State:
        ema, before = self.batch.ema, state.averages or (0.0,) * len(terms)
        averages = tuple(ema * old + (1 - ema) * new for old, new in zip(before, terms, strict=True))
        return replace(state, tests=state.tests + 1, averages=averages)

    def _guard(self, state: State, done: StepDone, demanded: float) -> tuple[float, Reason]:
        """(requested size, reason); the test is of the batch that was measured."""
        current = done.batch
        held = done.tokens - state.changed_at_tokens < self.batch.hold_tokens
        if demanded <= current:
            if self.batch.monotone or demanded == current or current <= self.first:
                return state.requested, "passed"
            if held:
                return state.requested, "held"
            if round_up(demanded, self.multiple) >= current:
                return state.requested, "rounded"
            # By one multiple at least: rounding up must not undo a small step for ever.
            smaller = min(max(demanded, current / self.batch.growth_cap), current - self.multiple)
            return max(smaller, self.first), "shrank"
        if held or current >= self.largest:
            return state.requested, "held"
        limit = min(current * self.batch.growth_cap, self.largest)
        return (limit, "capped") if demanded > limit else (demanded, "grew")

    def _decision(self, requested: float, reason: Reason, log: dict[str, float]) -> Decision:
        return Decision(min(round_up(requested, self.multiple), self.largest), requested, reason, log)


def _agreed(demands: tuple[float, ...], batch: int) -> float:
    """The demand that all of these tests support: the smallest if all are above the batch (AdaBatchGrad,
    Ostroukhov et al. 2024, arXiv 2402.05264), the largest if all are below, else the batch itself."""
    if min(demands) > batch:
        return min(demands)
    return min(max(demands), batch)


def noise_to_signal(noise: float, signal: float) -> float:
    """Infinite when no signal is left."""
    return max(noise, 0.0) / signal if signal > 0 else math.inf


def check_averaging(config: Config) -> list[str]:
    """Problems of a mean of gradients that stands for one of them, for the user."""
    batch, problems = config.batch, []
    if batch.averaged_steps is None:
        return []
    chosen = f"batch.averaged_steps={batch.averaged_steps}"
    if batch.averaged_steps < 2:
        problems.append(f"{chosen}: a mean needs two. Nearest: 2; 10 in Bollapragada et al. 2018; or null")
    if batch.averaged_ratio > 1:
        problems.append(f"batch.averaged_ratio={batch.averaged_ratio}: must be at most 1. Usual: 0.38")
    if batch.signal != "plain":
        problems.append(
            f"{chosen} batch.signal={batch.signal}: both are against the noise in the gradient's norm. Use "
            f"batch.signal=plain or batch.averaged_steps=null"
        )
    if config.parallel.strategy not in ("single", "ddp") or config.sync.method != "allreduce":
        problems.append(
            f"{chosen} parallel={config.parallel.strategy} sync={config.sync.method}: averages the whole "
            f"gradient of one model. Use parallel=single or parallel=ddp with sync=allreduce, or "
            f"batch.averaged_steps=null"
        )
    return problems


def check_shows_samples(config: Config) -> list[str]:
    """Problems of taking gradients of single samples, for the user."""
    parallel, chosen, problems = config.parallel, "batch.estimator=sample", []
    if config.model.kind == "llama":
        problems.append(
            f"{chosen} model={config.model.name}: gradients of single samples are those of labelled ones. "
            f"Use batch.estimator=microbatch; with data.micro_batch=1 it compares single sequences"
        )
    elif config.model.loss == "auc":
        problems.append(
            f"{chosen} model.loss=auc: the saddle point's own parameters lie in no layer of the model. "
            f"Use batch.estimator=microbatch"
        )
    if not strategy_class(parallel.strategy).shows_samples:
        problems.append(
            f"{chosen}: needs all parameters on every rank, which parallel={parallel.strategy} spreads. "
            f"Use parallel=single or parallel=ddp, or batch.estimator=microbatch"
        )
    if parallel.compile:
        problems.append(
            f"{chosen} parallel.compile=true: looks into layers, which a compiled model does not show. "
            f"Use parallel.compile=false"
        )
    if parallel.precision != "float32":
        problems.append(
            f"{chosen} parallel.precision={parallel.precision}: is exact in float32 alone. "
            f"Use parallel.precision=float32"
        )
    return problems


def _check_two_samples(config: Config) -> list[str]:
    batch, problems = config.batch, []
    if batch.measured_units is not None:
        problems.append(
            f"batch.measured_units={batch.measured_units}: counts micro-batches; batch.estimator=sample "
            f"needs it to be null"
        )
    if first_batch(config) < 2:
        problems.append(f"batch.size={batch.size}: the variance needs two samples. Nearest batch.size: 2")
    return problems


def _check_two_micro_batches(config: Config) -> list[str]:
    batch, micro, ranks = config.batch, config.data.micro_batch, config.parallel.data_ranks
    first = first_batch(config)
    if first >= 2 * micro:
        return []
    return [
        f"batch.size={batch.size}: the variance needs two micro-batches of data.micro_batch={micro}, and "
        f"{ranks} data-parallel rank with accumulation 1 has one. Nearest batch.size: {2 * micro} "
        f"(accumulation 2); or data.micro_batch={max(1, batch.size // 2)}, or two data-parallel ranks"
    ]
