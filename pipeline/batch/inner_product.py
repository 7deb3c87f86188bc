"""The augmented inner-product test: noise along the gradient and across it may differ.

Bollapragada, Byrd, Nocedal 2018 (arXiv 1710.11258): the batch must make −g a descent direction with high
probability (inner-product test, eq. 2.6) and keep g from leaning far to the side (orthogonality, eq. 3.3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.batch._adaptive import AVERAGING, GUARDS, Adaptive, check_averaging, noise_to_signal
from pipeline.batch._interface import Needs
from pipeline.optim import keeps_first_moment

if TYPE_CHECKING:
    from pipeline.config import BatchConfig, Config
    from pipeline.gradients.statistics import GradientStatistics


class Schedule(Adaptive):
    """T = max(σ∥²/(θ² D), σ⊥²/(ν² D)), where tr Σ = σ∥² + σ⊥² is the variance of one sequence's gradient
    along the step's direction and across it, and D = ‖g‖² or |G|² by `batch.signal`.

    One `batch.epsilon` in place of θ and ν means θ² = ε² σ∥²/tr Σ and ν² = ε² σ⊥²/tr Σ. With that split the
    two tests ask for tr Σ/(ε² D), the norm test's batch, and any other with θ² + ν² = ε² asks for more
    (Espath, Krumscheid, Tempone, Vilanova 2021, arXiv 2109.11933).

    The direction: `in_sample` is g itself, as in the paper: compared with gradients of ranks, or with
    `batch.estimator=sample` of single samples, which is the paper's test exactly. It contains the gradients
    that it is compared with, and in a batch of mostly noise it is a direction of the noise, so that σ∥² tells
    about tr Σ²/tr Σ.
    `momentum` (the optimizer's first moment) and `previous` (the mean gradient of the measured step before)
    are fixed before the batch is drawn; the variance along them has no bias.

    The paper's whole method: `estimator=sample`, `direction=in_sample`, `theta=0.9`, `nu=5.84`, `ema=0`,
    `averaged_steps=10` (see gradients/recent.py), and `optim=backtracking`.
    """

    settings = GUARDS | AVERAGING | {"theta", "nu", "epsilon", "direction", "signal", "estimator"}

    @classmethod
    def needs_of(cls, batch: BatchConfig) -> Needs:
        if batch.estimator == "sample":
            return Needs("sample", direction=batch.direction)
        if batch.direction == "in_sample":
            return Needs("worker")
        return Needs("microbatch", batch.measured_units, batch.direction)

    @classmethod
    def compares_by(cls, batch: BatchConfig) -> tuple[str, str]:
        return "direction", "momentum"

    @classmethod
    def check(cls, config: Config) -> list[str]:
        batch, problems = config.batch, super().check(config) + check_averaging(config)
        if batch.averaged_steps and (batch.direction, batch.estimator) != ("in_sample", "sample"):
            problems.append(
                f"batch.averaged_steps={batch.averaged_steps} batch.direction={batch.direction} "
                f"batch.estimator={batch.estimator}: the mean stands for the batch's own gradient, compared "
                f"with samples. Use batch.direction=in_sample batch.estimator=sample, or "
                f"batch.averaged_steps=null"
            )
        missing = [key for key in ("theta", "nu") if getattr(batch, key) is None]
        if batch.epsilon is None and missing:
            problems += [_missing(key) for key in missing]
        if batch.epsilon is not None and len(missing) < 2:
            problems.append(
                f"batch.epsilon={batch.epsilon} batch.theta={batch.theta} batch.nu={batch.nu}: epsilon "
                f"stands for both; set theta and nu to null, or epsilon"
            )
        if batch.direction == "momentum" and not keeps_first_moment(config.optim):
            problems.append(
                f"batch.direction=momentum: optim={config.optim.name} keeps no first moment of the gradient; "
                f"use batch.direction=previous"
            )
        return problems

    def terms(self, statistics: GradientStatistics) -> tuple[float, ...]:
        measured = statistics.workers if self.needs.units == "worker" else statistics
        assert measured
        return (
            measured.parallel_variance,
            measured.orthogonal_variance,
            statistics.squared_norm(self.batch.signal),
        )

    def demand(self, averages: tuple[float, ...]) -> float:
        parallel, orthogonal, signal = averages
        batch = self.batch
        if batch.epsilon is not None:
            return noise_to_signal(parallel + orthogonal, signal) / batch.epsilon**2
        assert batch.theta and batch.nu
        return max(
            noise_to_signal(parallel, signal) / batch.theta**2,
            noise_to_signal(orthogonal, signal) / batch.nu**2,
        )

    def extra_log(self, averages: tuple[float, ...], batch: int) -> dict[str, float]:
        """The smallest θ and ν that this batch would pass with."""
        parallel, orthogonal, signal = averages
        return {
            "test/theta_eff": math.sqrt(noise_to_signal(parallel, signal) / batch),
            "test/nu_eff": math.sqrt(noise_to_signal(orthogonal, signal) / batch),
        }


def _missing(key: str) -> str:
    test, usual = {
        "theta": ("the inner-product test", "0.9 in Bollapragada et al. 2018"),
        "nu": ("the orthogonality test", "5.84 there; a very large one leaves the other test alone"),
    }[key]
    return (
        f"batch.{key}=null: {test} needs it ({usual}). Or set batch.epsilon alone for the best split of both"
    )
