from __future__ import annotations

import numpy as np
import pytest

from analysis import align


def of(*values: float) -> align.Array:
    return np.array(values, dtype=np.float64)


def test_interpolation_stays_inside_the_curve() -> None:
    found = align.interpolate(of(10, 20), of(1, 3), of(5, 10, 15, 20, 21))
    assert np.isnan(found[[0, 4]]).all()
    assert found[1:4].tolist() == [1, 2, 3]


def test_a_step_quantity_holds_until_the_step_ends() -> None:
    """Batch 8 until 10 tokens, 16 until 30: at 10 it is still 8, just after it is 16."""
    found = align.hold(of(10, 30), of(8, 16), of(0, 10, 10.1, 30, 31))
    assert found[:4].tolist() == [8, 8, 16, 16]
    assert np.isnan(found[4])


def test_window_mean_weights_steps_by_their_length() -> None:
    """Loss 4 on (0, 10], 2 on (10, 40]; a window of 20 around 15 covers 5 of the first and 15 of the second."""
    found = align.window_mean(of(10, 40), of(4, 2), of(15, 0, 40), 20)
    assert found.tolist() == pytest.approx([(5 * 4 + 15 * 2) / 20, 4, 2])


def test_window_mean_shows_a_gap_where_the_loss_was_no_number() -> None:
    found = align.window_mean(of(10, 20, 30, 40), of(4, np.nan, 2, 2), of(5, 15, 24, 35), 8)
    assert np.isnan(found).tolist() == [False, True, False, False]
    assert found[[0, 3]].tolist() == [4, 2]


def test_grids_are_common_to_all_curves() -> None:
    curves = [of(1, 5, 9), of(3, 5, 12)]
    assert align.shared_points(curves).tolist() == [3, 5, 9]
    assert align.uniform_grid(curves, 3).tolist() == [3, 6, 9]
    assert len(align.uniform_grid([of(1, 2), of(3, 4)], 5)) == 0
    assert len(align.shared_points([])) == 0


def test_running_median_ignores_a_wild_value() -> None:
    assert align.running_median(of(1, 2, -900, 4, 5), 3).tolist() == [1.5, 1, 2, 4, 4.5]


def test_thinning_keeps_ends_and_extremes() -> None:
    y = np.sin(np.arange(10_000) / 300)
    y[1234], y[8765] = 5, -5
    kept = align.thin(y, 200)
    assert len(kept) <= 202 and (np.diff(kept) > 0).all()
    assert {0, 1234, 8765, 9999} <= set(kept.tolist())
    assert align.thin(of(1, np.nan, 2), 400).tolist() == [0, 1, 2]
