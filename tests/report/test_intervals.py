"""Paired intervals are Student's, as scipy computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from topkd.report.analysis.intervals import compute_interval, subtract_paired, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 7, 30, 31, 60, 500])
def test_quantiles_are_students(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-4)


def test_a_paired_interval_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    first = dict(enumerate(rng.normal(1.0, 0.3, 9)))
    second = dict(enumerate(rng.normal(0.5, 0.3, 9)))
    found = subtract_paired(first, second)
    reference = stats.ttest_rel(list(first.values()), list(second.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), rel=1e-4)
    assert found.n == 9


def test_only_seeds_that_both_have_are_paired() -> None:
    found = subtract_paired({0: 1.0, 1: 2.0, 5: 100.0}, {0: 0.5, 1: 1.0, 7: -100.0})
    assert found.n == 2
    assert found.mean == pytest.approx(0.75)


def test_one_value_has_no_interval() -> None:
    one = compute_interval([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.low)
