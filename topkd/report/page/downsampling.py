"""Down-samples long series: of every stretch, the lowest and the highest value are kept.

The functions take and return arrays. NaN is a hole in a line and stays one: no line is drawn across a hole.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


def keep_extremes(values: Floats, points: int) -> Rows:
    """Keep at most ``points`` rows of ``values``: minimum and maximum of each equal stretch, and both ends.

    In a stretch, every dropped value lies between the kept minimum and maximum. A stretch of NaN only keeps its first
    row. A series of at most ``points`` values is kept whole.
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
    """Keep at most ``points`` evenly spaced rows of a smooth series, with both ends."""
    if size <= points:
        return np.arange(size)
    return np.unique(np.linspace(0, size - 1, points).round().astype(np.intp))


def choose_window(size: int) -> int:
    """Choose the number of values in a rolling mean: an odd number near a twentieth of the series; 1 if it is short."""
    return 1 if size < 30 else (size // 40) * 2 + 1


def compute_rolling_mean(values: Floats, window: int) -> Floats:
    """Compute the centred mean of the known values in a window, cut at the ends; NaN if all are unknown."""
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
