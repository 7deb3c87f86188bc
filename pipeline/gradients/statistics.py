"""What a batch-size test is given: sums over the gradients of one optimizer step, and their estimators.

The batch is split into J units (micro-batches, or ranks) of n_j sequences with mean gradients g_j;
N = Σ n_j and g = Σ n_j g_j / N. Only three numbers are ever reduced: Σ n_j‖g_j‖², Σ‖g_j‖² and ‖g‖².
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GradientStatistics:
    """One tested step, before clipping, loss scaling undone; the same numbers on every rank.

    Squared norms are of gradients of the mean loss per token.
    """

    units: int  # J
    sequences: int  # N
    sum_weighted_sq_norm: float  # Σ n_j ‖g_j‖²
    sum_sq_norm: float  # Σ ‖g_j‖²
    mean_sq_norm: float  # ‖g‖²

    @property
    def variance(self) -> float:
        """Unbiased trace of the covariance of one sequence's gradient, tr Σ.

        (Σ n_j‖g_j‖² − N‖g‖²) / (J − 1); with equal units of u sequences this is u·S/(J − 1),
        S = Σ‖g_j − g‖². NaN when there is a single unit.
        """
        if self.units < 2:
            return math.nan
        return (self.sum_weighted_sq_norm - self.sequences * self.mean_sq_norm) / (self.units - 1)

    @property
    def signal(self) -> float:
        """Unbiased squared norm of the true gradient, |G|² ≈ ‖g‖² − tr Σ/N. May be negative."""
        return self.mean_sq_norm - self.variance / self.sequences

    @property
    def noise_scale(self) -> float:
        """B_simple = tr Σ/|G|² in sequences (McCandlish et al. 2018, eq. 2.9); of one step very noisy."""
        return self.variance / self.signal if self.signal > 0 else math.nan

    @property
    def population_variance(self) -> float:
        """(1/J) Σ‖g_j − g‖², as Lau et al. 2024 print it in eq. 5: no factor for the size of a unit."""
        return (self.sum_sq_norm - self.units * self.mean_sq_norm) / self.units
