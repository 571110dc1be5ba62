"""Paired differences and ratios over seeds, with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z95 = 1.959963985


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its two-sided 95 % Student-t interval; no interval (NaN) for fewer than two values."""

    mean: float
    low: float
    high: float
    n: int

    def within_shares(self) -> Interval:
        """Return the interval cut at 0 and 1, the bounds of a share."""
        return replace(self, low=max(self.low, 0.0), high=min(self.high, 1.0)) if math.isfinite(self.low) else self


def t_quantile(freedom: int) -> float:
    """Compute the 97.5 % quantile of Student's t to 4 digits; above 30 degrees, with the first terms of a series."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    return _Z95 + (_Z95**3 + _Z95) / (4 * freedom) + (5 * _Z95**5 + 16 * _Z95**3 + 3 * _Z95) / (96 * freedom**2)


def compute_interval(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Compute the mean of the values and its 95 % interval."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean()) if array.size else math.nan
    if array.size < 2:
        return Interval(mean, math.nan, math.nan, int(array.size))
    half = t_quantile(array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half, int(array.size))


def subtract_paired(first: dict[int, float], second: dict[int, float]) -> Interval:
    """Subtract the second from the first over the seeds that both have."""
    return compute_interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def compute_paired_ratio(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Compute the geometric mean of first / second over pairs, with the 95 % t-interval of the mean log ratio.

    Pairs without a finite ratio are left out.
    """
    logs = np.log(np.asarray(first, dtype=np.float64) / np.asarray(second, dtype=np.float64))
    interval = compute_interval(logs[np.isfinite(logs)])
    return Interval(math.exp(interval.mean), math.exp(interval.low), math.exp(interval.high), interval.n)
