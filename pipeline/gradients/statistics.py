"""What a batch-size test is given: sums over the gradients of one optimizer step, and their estimators.

The batch is split into J units (micro-batches, ranks, or single samples) of n_j sequences with mean gradients
g_j; N = Σ n_j and g = Σ n_j g_j / N. Σ is the covariance of one sequence's gradient, G its mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Projections:
    """⟨g_j, d⟩ of the measured units along a direction d that was fixed before the batch was drawn.

    Such a direction makes the variance unbiased; the batch's own mean does not (see WorkerProducts).
    """

    sequences: tuple[int, ...]  # n_j
    products: tuple[float, ...]  # ⟨g_j, d⟩
    sq_norm: float  # ‖d‖²

    @property
    def mean(self) -> float:
        """⟨g, d⟩ over the measured units."""
        return float(np.average(self.products, weights=self.sequences))

    @property
    def variance(self) -> float:
        """Unbiased dᵀΣd: Σ n_j (⟨g_j, d⟩ − ⟨g, d⟩)² / (J − 1). NaN with fewer than two units."""
        return _weighted_variance(np.array(self.sequences, float), np.array(self.products))

    @property
    def parallel_variance(self) -> float:
        """Unbiased variance of one sequence's gradient along d: dᵀΣd/‖d‖². NaN where d is 0."""
        return self.variance / self.sq_norm if self.sq_norm > 0 else math.nan


@dataclass(frozen=True)
class SampleProducts:
    """⟨g_i, d⟩ of all single samples of a step, as sums.

    Along d = g this is Bollapragada et al. 2018 as printed: `variance` is the numerator of eq. 2.6, and what
    is left of tr Σ across it that of eq. 3.3, since Σ‖g_i − ⟨g_i, g⟩/‖g‖² g‖² = Σ‖g_i − g‖² −
    Σ(⟨g_i, g⟩ − ‖g‖²)²/‖g‖². g contains g_i: see WorkerProducts.
    """

    samples: int
    total: float  # Σ ⟨g_i, d⟩
    squares: float  # Σ ⟨g_i, d⟩²
    sq_norm: float  # ‖d‖²

    @property
    def mean(self) -> float:
        """⟨g, d⟩."""
        return self.total / self.samples

    @property
    def variance(self) -> float:
        """Σ (⟨g_i, d⟩ − ⟨g, d⟩)² / (n − 1): unbiased dᵀΣd of a d fixed before. NaN with one sample."""
        if self.samples < 2:
            return math.nan
        return (self.squares - self.samples * self.mean**2) / (self.samples - 1)

    @property
    def parallel_variance(self) -> float:
        """The same along the unit vector d/‖d‖. NaN where d is 0."""
        return self.variance / self.sq_norm if self.sq_norm > 0 else math.nan


@dataclass(frozen=True)
class WorkerProducts:
    """The exact Gram matrix of the ranks' gradients, and what the papers' in-sample tests make of it."""

    sequences: tuple[int, ...]  # n_j of each worker
    gram: Matrix  # [J, J], ⟨g_i, g_j⟩

    @property
    def with_mean(self) -> Matrix:
        """⟨g_j, g⟩, [J]."""
        weights = np.array(self.sequences, float)
        products: Matrix = self.gram @ weights / weights.sum()
        return products

    @property
    def inner_product_variance(self) -> float:
        """Σ n_j (⟨g_j, g⟩ − ‖g‖²)² / (J − 1), for one sequence: Bollapragada et al. 2018, eq. 2.6.

        g contains g_j, so this exceeds GᵀΣG, by 1.1 to 500 times in a small transformer: most for small
        batches (see `unbiased_inner_product_variance`).
        """
        return _weighted_variance(np.array(self.sequences, float), self.with_mean)

    @property
    def mean_sq_norm(self) -> float:
        """‖g‖² of the workers' mean."""
        return float(np.average(self.with_mean, weights=self.sequences))

    @property
    def parallel_variance(self) -> float:
        """The same along the unit vector g/‖g‖, to be compared with ‖g‖². NaN where g is 0."""
        squared = self.mean_sq_norm
        return self.inner_product_variance / squared if squared > 0 else math.nan

    @property
    def orthogonal_variance(self) -> float:
        """Σ n_j ‖g_j − ⟨g_j, g⟩/‖g‖² g‖² / (J − 1), for one sequence: ibid. eq. 3.3."""
        weights, products, squared = np.array(self.sequences, float), self.with_mean, self.mean_sq_norm
        if len(weights) < 2 or squared <= 0:
            return math.nan
        squares = np.diag(self.gram) - products**2 / squared
        return float(weights @ squares / (len(weights) - 1))

    @property
    def unbiased_inner_product_variance(self) -> float:
        """Unbiased GᵀΣG of one sequence from J ≥ 4 workers of equal batches; else NaN.

        With distinct i, j, k, l: E⟨g_i, g_j⟩⟨g_i, g_k⟩ = Gᵀ(Σ/n)G + ‖G‖⁴ and E⟨g_i, g_j⟩⟨g_k, g_l⟩ = ‖G‖⁴, so
        the difference of their averages over all such indices (U-statistics) has no bias. Very noisy while
        the batch is much smaller than the noise scale.
        """
        count = len(self.sequences)
        if count < 4 or len(set(self.sequences)) > 1:
            return math.nan
        off_diagonal = self.gram - np.diag(np.diag(self.gram))
        rows, squares = off_diagonal.sum(1), off_diagonal**2
        pairs = squares.sum()
        triples = (rows**2 - squares.sum(1)).sum()  # Σ over i and ordered j ≠ k
        quadruples = rows.sum() ** 2 - 4 * triples - 2 * pairs
        per_worker = triples / (count * (count - 1) * (count - 2))
        per_worker -= quadruples / (count * (count - 1) * (count - 2) * (count - 3))
        return float(self.sequences[0] * per_worker)


# Ratios are counted in bins of a quarter octave: their quantiles are known to within 19 %.
RATIO_BINS, BINS_PER_OCTAVE, LOWEST_OCTAVE = 512, 4, -40


@dataclass(frozen=True)
class Coordinates:
    """Of each coordinate k of the gradient: σ_k², the variance of one sequence's, and the mean g_k."""

    # Σ σ_k, also from few units without bias; squared, over ‖g‖₁², the noise scale of sign methods (Naganuma
    # et al. 2026)
    sum_deviation: float
    sum_magnitude: float  # ‖g‖₁
    ratio_counts: tuple[float, ...]  # [RATIO_BINS] coordinates by log₂ σ_k²/g_k²; 0/0 is left out

    def ratio_quantile(self, share: float) -> float:
        """A bound that σ_k²/g_k² does not exceed for this share of the coordinates; 1 for all of them, as the
        coordinate-wise test of AdAdaGrad asks (Lau et al. 2024, arXiv 2402.11215). NaN if there are none."""
        counts = np.cumsum(self.ratio_counts)
        if counts[-1] == 0:
            return math.nan
        upper = int(np.searchsorted(counts, share * counts[-1] * (1 - 1e-12))) + 1
        return float(2.0 ** (LOWEST_OCTAVE + upper / BINS_PER_OCTAVE)) if upper < RATIO_BINS else math.inf


@dataclass(frozen=True)
class GradientStatistics:
    """One tested step, before clipping, loss scaling undone; the same numbers on every rank.

    Squared norms are of gradients of the mean loss per token.
    """

    units: int  # J, those measured
    sequences: int  # N of the whole step
    sum_weighted_sq_norm: float  # Σ n_j ‖g_j‖² over measured units
    sum_sq_norm: float  # Σ ‖g_j‖² over measured units
    mean_sq_norm: float  # ‖g‖² of the whole step
    measured_sequences: int | None = None  # N' = Σ n_j over measured units; None: all N
    along: Projections | SampleProducts | None = None
    workers: WorkerProducts | None = None
    coordinates: Coordinates | None = None
    averaged_sq_norm: float | None = None  # ‖g_avg‖² of the last steps, where that stands for g in tests
    step_sq_norm: float | None = None  # ‖(x − x⁺)/α‖², x⁺ = prox(x − αg); ‖g‖² without a proximal operator

    @property
    def variance(self) -> float:
        """Unbiased trace of the covariance of one sequence's gradient, tr Σ; NaN where undefined.

        (A − N'‖g‖²) / (J − N'/N) with A = Σ n_j‖g_j‖² over J measured units that hold N' of the step's N
        sequences: E A = J tr Σ + N'‖G‖² and E‖g‖² = tr Σ/N + ‖G‖². With all units measured and equal,
        u·S/(J − 1), S = Σ‖g_j − g‖².
        """
        measured = self.sequences if self.measured_sequences is None else self.measured_sequences
        freedom = self.units - measured / self.sequences
        if freedom <= 0:
            return math.nan
        return (self.sum_weighted_sq_norm - measured * self.mean_sq_norm) / freedom

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

    def squared_norm(self, of: Literal["plain", "debiased"]) -> float:
        """‖g‖² of the batch, or of what stands for g; or |G|² without the batch's noise."""
        if self.averaged_sq_norm is not None:
            return self.averaged_sq_norm
        return self.mean_sq_norm if of == "plain" else self.signal

    @property
    def parallel_variance(self) -> float:
        """Variance along the direction, dᵀΣd/‖d‖², unbiased unless that is g. NaN without one."""
        return self.along.parallel_variance if self.along else math.nan

    @property
    def orthogonal_variance(self) -> float:
        """Trace of Σ on the complement of the direction: tr Σ − dᵀΣd/‖d‖², as unbiased. NaN without one."""
        return self.variance - self.parallel_variance


def _weighted_variance(weights: Matrix, values: Matrix) -> float:
    """Σ w_j (x_j − x̄)² / (J − 1), x̄ = Σ w_j x_j / Σ w_j: with w_j sequences each, of one sequence."""
    if len(values) < 2:
        return math.nan
    return float(weights @ (values - np.average(values, weights=weights)) ** 2 / (len(values) - 1))
