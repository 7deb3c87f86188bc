"""Numbers as text: as many digits as their uncertainty deserves, and no more."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
LOSS_DECIMALS = 3  # of a loss without an interval: four digits


def decimals_for(half_width: float) -> int:
    """Decimals that show an uncertainty with two digits."""
    if not math.isfinite(half_width) or half_width <= 0:
        return LOSS_DECIMALS + 1
    if half_width < 1e-12:  # rounding
        return LOSS_DECIMALS + 1
    exponent = math.floor(math.log10(float(f"{half_width:.1e}")))  # 0.0996 rounds to 0.10
    return min(max(1 - exponent, 0), 6)


def fixed(value: float | None, decimals: int = LOSS_DECIMALS) -> str:
    """So many decimals, with thousands separated: 1,234.5000; words where it is no finite number."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    text = f"{value:,.{decimals}f}"
    if text.startswith("-") and not text.strip("-0.,"):
        text = text[1:]
    return text.replace("-", MINUS)


def with_interval(mean: float | None, half_width: float | None) -> str:
    """2.175 ± 0.020; without an interval the mean alone."""
    if mean is None or half_width is None or not math.isfinite(mean):
        return fixed(mean)
    decimals = decimals_for(half_width)
    return f"{fixed(mean, decimals)} ± {fixed(half_width, decimals)}"


def signed(value: float | None, decimals: int = LOSS_DECIMALS) -> str:
    """Like `fixed`, with + before what is above 0."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def signed_with_interval(mean: float, half_width: float | None) -> str:
    """−0.025 ± 0.010; without an interval the mean alone."""
    if half_width is None:
        return signed(mean)
    decimals = decimals_for(half_width)
    return f"{signed(mean, decimals)} ± {fixed(half_width, decimals)}"


def interval(low: float, high: float) -> str:
    """−0.010 to 0.034"""
    decimals = decimals_for((high - low) / 2)
    return f"{fixed(low, decimals)} to {fixed(high, decimals)}"


def with_limits(mean: float, low: float, high: float) -> str:
    """2.175 (2.160 to 2.190)"""
    return f"{fixed(mean, decimals_for((high - low) / 2))} ({interval(low, high)})"


def share(mean: float, low: float, high: float) -> str:
    """80% (28 to 99%)"""
    return f"{mean:.0%} ({100 * low:.0f} to {high:.0%})"


def ratio(mean: float, low: float, high: float) -> str:
    """1.31× (1.20 to 1.43); without any width the number alone."""
    if low == high:
        return f"{fixed(mean, 2)}×"
    return f"{fixed(mean, decimals_for((high - low) / 2))}× ({interval(low, high)})"


def probability(p: float | None) -> str:
    """0.34, 0.034, <0.001"""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.{2 if p >= 0.1 else 3}f}"


def count(value: float | None) -> str:
    """A mean of counts: 392, 267.5, 12,000."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:,.1f}"


def compact(value: float | None, digits: int = 4) -> str:
    """A few digits and a unit: 800k, 1.5M, 799.7k, 2B."""
    if value is None:
        return MISSING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{float(f'{value / size:.{digits}g}'):g}{unit}"
    return f"{value:.{digits}g}"


def flops(value: float) -> str:
    """Three digits and a prefix: 1.02 PFLOPs, 340 TFLOPs."""
    for prefix, size in (("Y", 1e24), ("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if abs(value) >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):g} {prefix}FLOPs"
    return f"{value:,.0f} FLOPs"


def duration(seconds: float | None) -> str:
    """12.3 s, 4.5 min, 6.7 h, 8.9 d."""
    if seconds is None:
        return MISSING
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def small(value: float | None) -> str:
    """Two digits, whatever the size: 0.12, 3.4e-05."""
    return MISSING if value is None else f"{value:.2g}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Of a share: 12.3%."""
    return MISSING if value is None else f"{100 * value:.1f}%"


def listed(values: Sequence[object]) -> str:
    """a, b and c"""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


def change(value: float, reference: float) -> str:
    """The relative change: −32%."""
    percent = 100 * (value / reference - 1)
    return f"{signed(percent, 0)}%"
