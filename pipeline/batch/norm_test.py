"""The norm test: the batch is large enough when its gradient's noise is small beside its norm.

Byrd, Chin, Nocedal, Wu 2012, in the form of Lau, Li, Xu, Liu, Kolar 2024 (arXiv 2412.21124, eq. 3 and
Algorithm 1): grow the batch from b to ⌈T⌉ when T = V/(η²‖g‖²) > b.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._adaptive import AVERAGING, GUARDS, Adaptive, check_averaging, noise_to_signal

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.gradients.statistics import GradientStatistics


class Schedule(Adaptive):
    """T = V/(η² D) with V by `batch.estimator` and D by `batch.signal`.

    V: `microbatch`, `worker`, `sample`: unbiased tr Σ of one sequence from that kind of unit; `paper`: eq. 5
    as printed, (1/J) Σ‖g_j − g‖² over the J ranks, which lacks the factor for the size of a worker's batch.
    Then T cannot exceed (J − 1)/η² in expectation, and the paper's own schedules, which reach 8192
    sequences with J = 4, cannot come from it.
    D: `plain` ‖g‖² as in the paper, which settles at B_simple(1 − η²)/η²; `debiased` |G|², at B_simple/η².
    """

    settings = GUARDS | AVERAGING | {"eta", "signal", "estimator"}

    @classmethod
    def check(cls, config: Config) -> list[str]:
        problems = super().check(config) + check_averaging(config)
        batch = config.batch
        if batch.estimator == "paper" and batch.signal == "debiased":
            problems.append(
                "batch.signal=debiased: the paper's estimator is defined with the plain norm; "
                "use batch.signal=plain or batch.estimator=worker"
            )
        return problems

    def terms(self, statistics: GradientStatistics) -> tuple[float, ...]:
        paper = self.batch.estimator == "paper"
        variance = statistics.population_variance if paper else statistics.variance
        return variance, statistics.squared_norm(self.batch.signal)

    def demand(self, averages: tuple[float, ...]) -> float:
        variance, signal = averages
        return noise_to_signal(variance, signal) / self.batch.eta**2
