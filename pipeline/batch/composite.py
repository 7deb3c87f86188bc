"""The test of the complete step of a constrained or regularised problem, F + h with a proximal step.

Xie, Bollapragada, Byrd, Nocedal 2020 (arXiv 2012.15411). At a solution x* of such a problem ∇F(x*) is not 0,
so that a test of the gradient is content with a batch that does not grow, and the run stays in a ball of
noise around x*. What vanishes there is the step d = prox(x − αg) − x: this test compares the noise with that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pipeline.batch._adaptive import Adaptive, noise_to_signal
from pipeline.batch._interface import Decision, Needs, State, StepDone, round_up

if TYPE_CHECKING:
    from pipeline.config import BatchConfig, Config
    from pipeline.gradients.statistics import GradientStatistics

OPTIMIZERS = ("prox_sgd", "sgd")
OF_GUARDS = frozenset({"size", "max_size", "round_to", "interval", "start_tokens", "growth_cap"})


class Schedule(Adaptive):
    """T = V/(θ² D) with D = ‖d‖²/α². By `batch.form`, of which inner_product never asks for more than norm:

    norm            V = tr Σ, from E‖g − ∇F‖² ≤ θ² ‖E d‖²/α². The operator does not expand, so that
                    ‖d − d̄‖ ≤ α‖g − ∇F‖ of the step d̄ along ∇F, and θ bounds the relative error of the step.
    inner_product   V = dᵀΣd/‖d‖², that is T = α² Var⟨g_i, d⟩/(θ² ‖d‖⁴): the standard deviation of
                    ⟨g − ∇F, d⟩ is at most θ‖d‖²/α.

    The paper's own text was not at hand; its conditions are quoted from memory. Its norm condition is the one
    above. `inner_product` is a variant and not the paper's: as quoted, that bounds E⟨∇F − g, d⟩ by
    θ/α ‖E d‖². Without an h, where d = −αg, the left side is α E‖g − ∇F‖², so that it asks for
    E‖g − ∇F‖² ≤ θ‖∇F‖², the norm test with √θ, and not for an inner-product test. Built is the form with a
    variance, as Bollapragada et al. 2018 make of theirs, with d as if it were fixed: without an h it is their
    inner-product test (eq. 2.6 there) with θ, as `norm` is the norm test.

    The batch that a test finds too small is enlarged before the step is taken: more samples of the stream are
    drawn, their gradients join those that are known, and the step that would follow is tested again. The next
    step begins with the size of this one. Nothing is averaged over steps, and the batch never shrinks.
    """

    settings = OF_GUARDS | {"theta", "form", "estimator"}
    never_shrinks = True

    @classmethod
    def needs_of(cls, batch: BatchConfig) -> Needs:
        direction: Literal["step"] | None = "step" if batch.form == "inner_product" else None
        return replace(super().needs_of(batch), direction=direction, measured_units=None, redraws=True)

    @classmethod
    def check(cls, config: Config) -> list[str]:
        batch, optim, parallel = config.batch, config.optim, config.parallel
        problems, chosen = super().check(config), f"batch.schedule={batch.schedule}"
        able = ("sample",) if batch.form == "inner_product" else ("microbatch", "sample")
        if batch.estimator not in able:
            problems.append(
                f"batch.estimator={batch.estimator}: {chosen} batch.form={batch.form} is known for "
                f"batch.estimator={' or '.join(able)}"
                + ("; or use batch.form=norm" if batch.form == "inner_product" else "")
            )
        if batch.theta is None:
            problems.append(f"batch.theta=null: {chosen} needs it. A usual choice: 0.9")
        if optim.name not in OPTIMIZERS:
            problems.append(
                f"optim={optim.name}: {chosen} knows the step that follows from a gradient alone. Use "
                f"optim=prox_sgd, or optim=sgd optim.momentum=0"
            )
        elif optim.name == "sgd":
            problems += [
                f"optim.{key}={value}: {chosen} tests a step that follows from the gradient alone. Use "
                f"optim.{key}=0{instead}"
                for key, value, instead in (
                    ("momentum", optim.momentum, ""),
                    ("weight_decay", optim.weight_decay, ", and model.l2 or optim=prox_sgd for a penalty"),
                )
                if value
            ]
        if optim.clip is not None:
            problems.append(
                f"optim.clip={optim.clip}: {chosen} tests the step along the whole gradient. Use "
                f"optim.clip=null"
            )
        if parallel.strategy not in ("single", "ddp"):
            problems.append(
                f"parallel={parallel.strategy}: {chosen} takes more samples into a step whose gradient is "
                f"whole on every rank. Use parallel=single or parallel=ddp"
            )
        if config.sync.method != "allreduce":
            problems.append(f"sync={config.sync.method}: {chosen} tests one step of all. Use sync=allreduce")
        return problems

    def redraw(self, batch: int, left: int, statistics: GradientStatistics) -> Decision:
        demanded = self._demanded(statistics)
        log = {"test/statistic": demanded, "test/threshold": float(batch)}
        if math.isnan(demanded):
            return Decision(batch, batch, "unmeasured", {})
        largest = min(self.largest, batch + left)
        if demanded <= batch or batch >= largest:
            return Decision(batch, batch, "passed" if demanded <= batch else "held", log)
        limit = min(batch * self.batch.growth_cap, largest)
        requested, capped = min(demanded, limit), demanded > limit
        size = min(round_up(requested, self.multiple), largest)
        return Decision(size, requested, "capped" if capped else "grew", log)

    def decide(
        self, state: State, done: StepDone, statistics: GradientStatistics | None
    ) -> tuple[State, Decision]:
        state = State(max(state.requested, done.batch))
        last = self.redraw(done.batch, 0, statistics) if statistics else None
        return state, self._decision(
            state.requested, last.reason if last else "unmeasured", last.log if last else {}
        )

    def _demanded(self, statistics: GradientStatistics) -> float:
        assert self.batch.theta and statistics.step_sq_norm is not None
        inner = self.batch.form == "inner_product"
        noise = statistics.parallel_variance if inner else statistics.variance
        return noise_to_signal(noise, statistics.step_sq_norm) / self.batch.theta**2
