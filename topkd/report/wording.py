"""Numbers in words: the same digits, signs and units everywhere on the page."""

from __future__ import annotations

import math

from topkd.report.intervals import Interval


def number(value: float | None) -> str:
    """Four significant digits, a true minus sign; "?" for what is not known."""
    if value is None or not math.isfinite(value):
        return "?"
    return f"{value:.4g}".replace("-", "−")


def change(first: float, last: float) -> str:
    """The change in per cent."""
    if not (math.isfinite(first) and math.isfinite(last)) or first == 0.0:
        return "change unknown"
    return f"{100 * (last / first - 1):+.0f} %".replace("-", "−")


def between(end: Interval) -> str:
    """A mean with its interval, where there is one."""
    if not math.isfinite(end.low):
        return number(end.mean)
    return f"{number(end.mean)} [{number(end.low)}, {number(end.high)}]"


def short(value: float) -> str:
    """A count in at most four digits: 153.6k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}"
