"""How the learning rate follows the batch, by `lr.batch_scaling`; pure, like the schedules.

none, sqrt, linear   1, √S, S, where S is the batch over the run's first one
adascale             AdaScale's gain, which the gradient's noise decides
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.batch._interface import Needs

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.gradients.statistics import GradientStatistics

_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True)
class Noise:
    """Averages of measured steps, not yet corrected for their start at 0; their ratio needs no correction."""

    variance: float = 0.0  # tr Σ of one sequence's gradient
    signal: float = 0.0  # |G|²


class BatchScaling:
    """The factor on the learning rate of a step with S times the first batch."""

    def __init__(self, config: Config) -> None:
        self._rule = config.lr.batch_scaling
        self.needs = Needs("microbatch") if self._rule == "adascale" else None  # at every step

    def factor(self, batch: int, first_batch: int, noise: Noise) -> float:
        growth = batch / first_batch
        if self._rule != "adascale":
            return float(growth ** _EXPONENTS[self._rule])
        return gain(growth, noise.variance / first_batch, noise.signal)

    def observe(self, noise: Noise, statistics: GradientStatistics, batch: int, first_batch: int) -> Noise:
        """With a measured step's. Johnson et al. average over about 1000/S steps (appendix B.3)."""
        if not self.needs or math.isnan(statistics.variance):
            return noise
        kept = max(1 - batch / first_batch / 1000, 0.0)
        return Noise(
            kept * noise.variance + (1 - kept) * statistics.variance,
            kept * noise.signal + (1 - kept) * statistics.signal,
        )


def gain(growth: float, variance: float, signal: float) -> float:
    """AdaScale's gain ratio (σ² + μ²)/(σ²/S + μ²), from 1 (no noise) to S (nothing else).

    Johnson, Agrawal, Gu, Guestrin 2020 (arXiv 2007.05105, section 4). `variance`: σ², trace of the covariance
    of the first batch's gradient; `signal`: μ², squared norm of the true gradient.
    """
    variance, signal = max(variance, 0.0), max(signal, 0.0)
    if variance + signal == 0:
        return 1.0
    return (variance + signal) / (variance / growth + signal)
