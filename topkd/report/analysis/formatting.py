"""Formats numbers as text: with the same digits, signs and units everywhere on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from topkd.report.analysis.intervals import Interval

# Divergences: their keys in the run log, and their names on the page.
NAMES = {"reverse_kl": "KL(student ‖ teacher)", "forward_kl": "KL(teacher ‖ student)", "jsd": "Jensen-Shannon"}


def format_number(value: float | None) -> str:
    """Format a number with four significant digits and a minus sign (−); "?" for an unknown value."""
    if value is None or not math.isfinite(value):
        return "?"
    return f"{value:.4g}".replace("-", "−")


def format_change(first: float, last: float) -> str:
    """Format a change in per cent, with a decimal below 10 %; "" unless both values are above 0."""
    if not (0.0 < first < math.inf and 0.0 < last < math.inf) or first == last:
        return ""
    percent = 100 * (last / first - 1)
    if abs(percent) < 0.05:
        return " (less than 0.1 %)"
    return f" ({percent:+.{0 if abs(percent) >= 9.95 else 1}f} %)".replace("-", "−")


def format_interval(interval: Interval, format_value: Callable[[float], str] = format_number) -> str:
    """Format a mean, with its interval if there is one."""
    if not math.isfinite(interval.low):
        return format_value(interval.mean)
    return f"{format_value(interval.mean)} [{format_value(interval.low)}, {format_value(interval.high)}]"


def format_percent(share: float) -> str:
    """Format a share of one in per cent."""
    return f"{100 * share:.1f} %".replace("-", "−") if math.isfinite(share) else "?"


def compute_mean(values: Iterable[float | None]) -> float | None:
    """Compute the mean of the known values; None if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def format_short_count(value: float | None) -> str:
    """Format a count in at most four digits: 153.6k; "?" for an unknown one."""
    if value is None:
        return "?"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}"
