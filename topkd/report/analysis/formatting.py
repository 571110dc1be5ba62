"""Numbers in words: the same digits, signs and units everywhere on the page."""

from __future__ import annotations

import math
from collections.abc import Callable

from topkd.report.analysis.intervals import Interval

# What a run log calls its divergences, and what a reader is told.
NAMES = {"reverse_kl": "KL(student ‖ teacher)", "forward_kl": "KL(teacher ‖ student)", "jsd": "Jensen-Shannon"}


def format_number(value: float | None) -> str:
    """Four significant digits, a true minus sign; "?" for what is not known."""
    if value is None or not math.isfinite(value):
        return "?"
    return f"{value:.4g}".replace("-", "−")


def format_change(first: float, last: float) -> str:
    """The change in per cent, to stand behind the two; "" where a share of the first says nothing: not both above 0."""
    if not (0.0 < first < math.inf and 0.0 < last < math.inf):
        return ""
    return f" ({100 * (last / first - 1):+.0f} %)".replace("-", "−")


def format_interval(end: Interval, say: Callable[[float], str] = format_number) -> str:
    """A mean with its interval, where there is one."""
    if not math.isfinite(end.low):
        return say(end.mean)
    return f"{say(end.mean)} [{say(end.low)}, {say(end.high)}]"


def format_percent(share: float) -> str:
    """A share of one in per cent."""
    return f"{100 * share:.1f} %".replace("-", "−") if math.isfinite(share) else "?"


def format_short_count(value: float) -> str:
    """A count in at most four digits: 153.6k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}"
