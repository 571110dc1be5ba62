"""Histograms in 80 columns of text, two beside each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

WIDTH = 38  # of one picture; two and a gap are 80
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def draw_histogram(title: str, labels: Sequence[str], shares: Sequence[float], notes: Sequence[str] = ()) -> list[str]:
    """Draw a title, a bar for each label (the largest share fills the width), and notes below."""
    widest = max((len(label) for label in labels), default=0)
    room, top = WIDTH - widest - 8, max(shares, default=0.0) or 1.0
    lines = [title[:WIDTH]]
    for label, share in zip(labels, shares, strict=True):
        lines.append(f"{label:>{widest}} {draw_bar(share / top, room)} {format_share(share):>6}")
    return [*lines, *(note[:WIDTH] for note in notes)]


def join_side_by_side(left: Sequence[str], right: Sequence[str]) -> Iterator[str]:
    """Join the lines of two pictures."""
    for left_line, right_line in zip_longest(left, right, fillvalue=""):
        yield f"{left_line:<{WIDTH + 4}}{right_line}".rstrip()


def draw_bar(share: float, width: int) -> str:
    """Draw a bar to an eighth of a column; a share above zero is never empty."""
    eighths = round(8 * width * max(0.0, min(1.0, share)))
    if share > 0:
        eighths = max(eighths, 1)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return ("#" * max(-(-eighths // 8) if eighths < 8 else eighths // 8, 0)).ljust(width)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def format_share(share: float) -> str:
    """Format a share so that it differs from nothing and from all."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return "<0.1 %" if share < 0.5 else ">99.9%"
    return f"{100 * share:.0f} %" if share >= 0.1 or not share else f"{100 * share:.1f} %"


def label_bins(edges: Sequence[float], show: str = "{:g}") -> list[str]:
    """Label the bins between edges; the last is open above."""
    shown = [show.format(edge) for edge in edges]
    return [*(f"{low} to {high}" for low, high in pairwise(shown)), f"{shown[-1]} and up"]


def label_counts(edges: Sequence[float]) -> list[str]:
    """Label bins of whole numbers, whose upper edge is not in the bin."""
    whole = [int(edge) for edge in edges]
    bins = (str(low) if high == low + 1 else f"{low} to {high - 1}" for low, high in pairwise(whole))
    return [*bins, f"{whole[-1]} and up"]
