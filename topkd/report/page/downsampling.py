"""Long series made short without hiding anything: the lowest and the highest of every stretch are kept.

Arrays in, arrays out; NaN is a hole and stays one (a stretch of holes becomes one hole): a gap is never bridged.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


def keep_extremes(values: Floats, points: int) -> Rows:
    """Keep at most ``points`` rows of ``values``, in order: minimum and maximum of equal stretches, and both ends.

    No value above or below what is kept exists in its stretch. Where all of a stretch is NaN, its first row stands for
    it. A series that is short enough is kept whole.
    """
    if values.size <= points:
        return np.arange(values.size)
    stretches = max(1, (points - 2) // 2)
    edges = np.linspace(0, values.size, stretches + 1).astype(np.intp)
    keep = {0, int(values.size) - 1}
    for first, after in pairwise(edges.tolist()):
        part = values[first:after]
        known = np.flatnonzero(np.isfinite(part))
        if not known.size:
            keep.add(first)
            continue
        keep.add(first + int(known[part[known].argmin()]))
        keep.add(first + int(known[part[known].argmax()]))
    return np.array(sorted(keep), dtype=np.intp)


def keep_evenly(size: int, points: int) -> Rows:
    """Keep at most ``points`` rows of a smooth series, evenly spaced, both ends included."""
    if size <= points:
        return np.arange(size)
    return np.unique(np.linspace(0, size - 1, points).round().astype(np.intp))


def choose_window(size: int) -> int:
    """Choose how many neighbours a smoothed value averages: a twentieth of the series, odd, 1 when it is short."""
    return 1 if size < 30 else (size // 40) * 2 + 1


def compute_rolling_mean(values: Floats, window: int) -> Floats:
    """Compute the centred mean of the known values in a window cut at the ends; NaN where all are unknown."""
    if window <= 1:
        return values
    known = np.isfinite(values)
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(values.size)
    first, after = np.maximum(at - half, 0), np.minimum(at + half + 1, values.size)
    count = counts[after] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, (sums[after] - sums[first]) / count, np.nan)
