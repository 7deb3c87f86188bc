from __future__ import annotations

import math

import pytest

from analysis import numbers as text


@pytest.mark.parametrize(
    ("mean", "half_width", "shown"),
    [
        (2.17549, 0.01973, "2.175 ± 0.020"),
        (2.17549, 0.0996, "2.18 ± 0.10"),
        (2.17549, 1.27, "2.2 ± 1.3"),
        (2.17549, 0.00041, "2.17549 ± 0.00041"),
        (2.17549, 31.0, "2 ± 31"),
        (2.17549, None, "2.175"),
        (2.17549, 0.0, "2.1755 ± 0.0000"),
        (math.nan, None, "not a number"),
        (None, None, "–"),
    ],
)
def test_as_many_digits_as_the_interval_deserves(
    mean: float | None, half_width: float | None, shown: str
) -> None:
    assert text.with_interval(mean, half_width) == shown


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (text.interval(-0.0101, 0.0331), "\N{MINUS SIGN}0.010 to 0.033"),
        (text.with_limits(2.1749, 2.1601, 2.1902), "2.175 (2.160 to 2.190)"),
        (text.with_limits(2.0, 2.0, 2.0), "2.0000 (2.0000 to 2.0000)"),
        (text.share(0.8, 0.2836, 0.9949), "80% (28 to 99%)"),
        (text.share(0.0, 0.0, 0.708), "0% (0 to 71%)"),
        (text.probability(0.0004), "<0.001"),
        (text.probability(0.0351), "0.035"),
        (text.probability(0.0702), "0.070"),
        (text.probability(0.34), "0.34"),
        (text.probability(1.0), "1.00"),
        (text.probability(None), "–"),
        (text.fixed(-0.0001), "0.000"),
        (text.fixed(1234.5, 1), "1,234.5"),
        (text.fixed(math.inf), "infinite"),
        (text.signed(0.0123), "+0.012"),
        (text.signed(-0.0123), "\N{MINUS SIGN}0.012"),
        (text.signed(0.0001), "0.000"),
        (text.count(392.0), "392"),
        (text.count(267.5), "267.5"),
        (text.count(12_345.5), "12,346"),
        (text.compact(800_000), "800k"),
        (text.compact(799_744), "799.7k"),
        (text.compact(1_500_000), "1.5M"),
        (text.compact(2_000_000_000), "2B"),
        (text.compact(512), "512"),
        (text.compact(43_210, 3), "43.2k"),
        (text.duration(8.04), "8.0 s"),
        (text.duration(605), "10.1 min"),
        (text.duration(7200), "2.0 h"),
        (text.duration(400_000), "4.6 d"),
        (text.change(268, 392), "\N{MINUS SIGN}32%"),
        (text.change(410, 400), "+2%"),
    ],
)
def test_numbers_as_text(found: str, shown: str) -> None:
    assert found == shown
