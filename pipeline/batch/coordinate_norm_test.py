"""The coordinate-wise norm test: every coordinate of the gradient must have little noise.

AdAdaGrad (Lau, Liu, Kolar 2024, arXiv 2402.11215), and the condition of the theory in Lau et al. 2024
(arXiv 2412.21124, Proposition 1): σ_k²/b ≤ η² g_k² for every coordinate k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._adaptive import GUARDS, Adaptive
from pipeline.batch._interface import Needs

if TYPE_CHECKING:
    from pipeline.config import BatchConfig, Config
    from pipeline.gradients.statistics import GradientStatistics


class Schedule(Adaptive):
    """T = q(σ_k²/g_k²)/η², with q the quantile over coordinates at `batch.share`.

    A share of 1, the maximum, is the condition as written. Some coordinate of a network's gradient is always
    almost 0, and then it demands the cap at once; so a smaller share of the coordinates must pass here. The
    quantile is known to 19 % (see `Coordinates`). σ_k² is that of ranks, or exact with
    `batch.estimator=sample`.
    """

    settings = GUARDS | {"eta", "share", "estimator"}

    @classmethod
    def needs_of(cls, batch: BatchConfig) -> Needs:
        return Needs("sample" if batch.estimator == "sample" else "worker", coordinates=True)

    @classmethod
    def compares_by(cls, batch: BatchConfig) -> tuple[str, str]:
        return "schedule", "norm_test"

    @classmethod
    def check(cls, config: Config) -> list[str]:
        problems = super().check(config)
        if not 0 < config.batch.share <= 1:
            problems.append(f"batch.share={config.batch.share}: must be above 0 and at most 1")
        return problems

    def terms(self, statistics: GradientStatistics) -> tuple[float, ...]:
        assert statistics.coordinates
        demanded = statistics.coordinates.ratio_quantile(self.batch.share) / self.batch.eta**2
        # More than the cap can grant is as good as the cap, and an average stays finite. NaN stays NaN.
        return (self.largest if demanded > self.largest else demanded,)

    def demand(self, averages: tuple[float, ...]) -> float:
        return averages[0]
