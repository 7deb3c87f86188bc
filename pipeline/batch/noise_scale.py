"""The batch follows the gradient noise scale B_simple = tr Σ/|G|² (McCandlish et al. 2018, arXiv 1812.06162).

With b = B_simple/c² of Naganuma et al. (ICML 2026, arXiv 2602.03001), where c is the tolerated ratio of noise
to signal: c = 1 is McCandlish et al.'s batch, theirs is 0.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._adaptive import GUARDS, Adaptive, noise_to_signal
from pipeline.batch._interface import Needs

if TYPE_CHECKING:
    from pipeline.config import BatchConfig, Config
    from pipeline.gradients.statistics import GradientStatistics


class Schedule(Adaptive):
    """b = V/(c² D). `batch.norm=l2`: V = tr Σ and D = |G|², or ‖g‖² with `batch.signal=plain`, as
    Naganuma et al. compute it; then c is the norm test's η. `l1`: V = (Σ_k σ_k)² and D = ‖g‖₁² over the
    coordinates k, theirs for optimizers that step by signs; σ_k of few ranks is rid of its bias, which
    their many micro-batches do not have.
    """

    settings = GUARDS | {"c", "norm", "signal", "estimator"}

    @classmethod
    def needs_of(cls, batch: BatchConfig) -> Needs:
        if batch.norm == "l1":
            return Needs("sample" if batch.estimator == "sample" else "worker", coordinates=True)
        return super().needs_of(batch)

    @classmethod
    def compares_by(cls, batch: BatchConfig) -> tuple[str, str]:
        return ("norm", "l2") if batch.norm == "l1" else super().compares_by(batch)

    @classmethod
    def check(cls, config: Config) -> list[str]:
        batch, problems = config.batch, super().check(config)
        if batch.estimator == "paper":
            problems.append(
                "batch.estimator=paper: is of batch.schedule=norm_test alone; use microbatch, worker or "
                "sample"
            )
        if batch.norm == "l1" and batch.estimator not in ("worker", "sample"):
            problems.append(
                f"batch.estimator={batch.estimator}: batch.norm=l1 compares coordinates of ranks; use "
                f"batch.estimator=worker, or sample of labelled samples"
            )
        if batch.norm == "l1" and batch.signal != "plain":
            problems.append("batch.signal=debiased: is not known for batch.norm=l1; use batch.signal=plain")
        return problems

    def terms(self, statistics: GradientStatistics) -> tuple[float, ...]:
        if self.batch.norm == "l2":
            return statistics.variance, statistics.squared_norm(self.batch.signal)
        assert statistics.coordinates
        return statistics.coordinates.sum_deviation**2, statistics.coordinates.sum_magnitude**2

    def demand(self, averages: tuple[float, ...]) -> float:
        noise, signal = averages
        return noise_to_signal(noise, signal) / self.batch.c**2
