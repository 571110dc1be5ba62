"""Long series are shortened without losing an extreme or bridging a hole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topkd.report.page.downsampling import choose_window, compute_rolling_mean, keep_evenly, keep_extremes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=400), st.integers(6, 60))
def test_every_stretch_keeps_its_lowest_and_its_highest_value(values: list[float], points: int) -> None:
    array = np.array(values)
    kept = keep_extremes(array, points)
    assert kept.size <= max(points, 2)
    assert (np.diff(kept) > 0).all()
    if np.isfinite(array).any():
        assert np.nanmin(array[kept]) == np.nanmin(array)
        assert np.nanmax(array[kept]) == np.nanmax(array)


def test_a_short_series_is_kept_whole() -> None:
    assert keep_extremes(np.array([3.0, np.nan, 1.0]), 400).tolist() == [0, 1, 2]


def test_a_long_hole_stays_a_hole() -> None:
    values = np.arange(1000.0)
    values[400:600] = np.nan
    kept = keep_extremes(values, 50)
    inside = kept[(kept >= 410) & (kept < 590)]
    assert inside.size >= 4
    assert np.isnan(values[inside]).all()


def test_the_rolling_mean_is_the_mean_of_the_known_neighbours() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) for i in range(5)]
    assert compute_rolling_mean(values, 3) == pytest.approx(expected)
    assert np.isnan(compute_rolling_mean(np.array([1.0, np.nan, np.nan, np.nan, 1.0]), 3)[2])


def test_short_series_are_not_smoothed_and_windows_are_odd() -> None:
    assert choose_window(29) == 1
    assert all(choose_window(size) % 2 == 1 for size in range(500))
    assert choose_window(2000) == 101


def test_even_spacing_keeps_both_ends() -> None:
    rows = keep_evenly(1000, 7)
    assert rows[0] == 0
    assert rows[-1] == 999
    assert rows.size == 7
