"""Curves of several runs on one grid. Nothing is extrapolated: outside a run's own range the value is NaN."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
from numpy.typing import NDArray

Array = NDArray[np.float64]


def common_range(xs: list[Array]) -> tuple[float, float] | None:
    """Where all curves exist, or None where they never overlap."""
    if not xs or any(len(x) == 0 for x in xs):
        return None
    low, high = max(float(x[0]) for x in xs), min(float(x[-1]) for x in xs)
    return (low, high) if low <= high else None


def uniform_grid(xs: list[Array], points: int) -> Array:
    """`points` places over the common range; empty without one."""
    limits = common_range(xs)
    return np.empty(0) if limits is None else np.linspace(*limits, points)


def shared_points(xs: list[Array]) -> Array:
    """Every x of every curve inside the common range: for curves of few points, where a grid cuts corners."""
    limits = common_range(xs)
    if limits is None:
        return np.empty(0)
    union = np.unique(np.concatenate(xs))
    return union[(union >= limits[0]) & (union <= limits[1])]


def interpolate(x: Array, y: Array, grid: Array) -> Array:
    """Linear between the points of a curve."""
    return np.interp(grid, x, y, left=np.nan, right=np.nan)


def hold(x: Array, y: Array, grid: Array) -> Array:
    """A quantity of a step: y[i] holds on (x[i−1], x[i]], the step that ended at x[i]."""
    index = np.searchsorted(x, grid, side="left")
    inside = index < len(x)
    return np.where(inside, y[np.minimum(index, len(x) - 1)], np.nan)


def window_mean(x: Array, y: Array, grid: Array, width: float) -> Array:
    """Mean of a step quantity over (g − width/2, g + width/2], each step weighted by its length in x.

    The window is cut at the ends of the curve. A value that is not finite makes every window it touches NaN.
    """
    start = np.concatenate([[min(0.0, float(x[0]))], x])
    lengths = np.diff(start)
    bad = ~np.isfinite(y)
    edges_low = np.clip(grid - width / 2, start[0], start[-1])
    edges_high = np.clip(grid + width / 2, start[0], start[-1])

    def integral(values: Array) -> Array:
        total = np.concatenate([[0.0], np.cumsum(values * lengths)])
        result: Array = np.interp(edges_high, start, total) - np.interp(edges_low, start, total)
        return result

    covered = edges_high - edges_low
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Array = integral(np.where(bad, 0.0, y)) / covered
    return np.where((covered > 0) & (integral(bad.astype(np.float64)) == 0), mean, np.nan)


def running_median(y: Array, window: int) -> Array:
    """Centred median of `window` (odd) finite values, fewer at the ends."""
    found: Array = pl.Series(y).rolling_median(window, min_samples=1, center=True).to_numpy()
    return found


def thin(y: Array, points: int) -> NDArray[np.int64]:
    """Indices of about `points` rows that keep the look of a noisy curve: each bin's lowest and highest.

    For drawing only; statistics always use the whole curve.
    """
    n = len(y)
    if n <= points:
        return np.arange(n)
    edges = np.linspace(0, n, max(points // 2, 1) + 1).astype(int)
    safe = np.where(np.isfinite(y), y, np.inf)
    kept = {0, n - 1}
    for low, high in itertools.pairwise(edges):
        kept |= {low + int(np.argmin(safe[low:high])), low + int(np.argmax(safe[low:high]))}
    return np.array(sorted(kept))
