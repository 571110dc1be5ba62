"""Output of ``topkd cache stats`` in 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import Any

_BARS = 8  # largest number of bars in the histogram of K
_WIDTH, _REVISION = 80, 22  # columns of a table, and of a revision in it
_PICTURE = 38  # columns of a histogram; two and a gap are 80
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def describe_stats(totals: dict[str, Any], shapes: dict[str, Any]) -> Iterator[str]:
    """Yield lines of text about a cache: counts, teachers, and histograms of its scores.

    Args:
        totals: The result of ``offline.stats`` as a mapping.
        shapes: The result of ``offline.profile``.
    """
    per_token = "" if totals["bytes_per_token"] is None else f", {totals['bytes_per_token']:.1f} per token"
    rollouts = count_things(totals["rollouts"], "rollout")
    answers = totals["live"] - totals["scores"]  # a record has all rollouts of its request
    if answers != totals["rollouts"]:
        rollouts += f" in {count_things(answers, 'record')}"
    yield f"{count_things(totals['scores'], 'score')}, {rollouts}, {count_things(totals['tokens'], 'token')}"
    segments = count_things(totals["segments"], "segment")
    yield f"{totals['bytes']:,} bytes{per_token}; {segments}, {totals['sealed']} sealed"
    if dead := totals["records"] - totals["live"]:
        yield f"{count_things(dead, 'superseded record')}, which topkd cache gc removes"
    if totals["teachers"]:
        yield ""
        yield from _format_columns(
            ("TEACHERS AND SAMPLED POLICIES", "revision", "records", "tokens"),
            [(teacher["name"], teacher["revision"] or "-", f"{teacher['records']:,}", f"{teacher['tokens']:,}")
             for teacher in totals["teachers"]],
        )  # fmt: skip
    if shapes["scores"]:
        yield from _draw_shapes(totals, shapes)


def _draw_shapes(totals: dict[str, Any], shapes: dict[str, Any]) -> Iterator[str]:
    """Draw histograms of K, lengths, missing mass and entropy of the scores."""
    drawn, quantile = shapes["histograms"], {q: at for at, q in enumerate(shapes["quantiles"])}

    def at(name: str, share: float, show: str) -> str:
        return show.format(shapes[name][quantile[share]])

    total, spread = sum(totals["k"].values()), totals["rows"]
    asked = sorted(totals["k"].items())
    if len(asked) > _BARS:
        asked = [*asked[: _BARS - 1], (-1, sum(number for _, number in asked[_BARS - 1 :]))]
    k = draw_histogram(
        "K of the scores", ["wider" if k < 0 else str(k) for k, _ in asked], [n / total for _, n in asked]
    )
    lengths = draw_histogram(
        "positions of a score", label_counts(drawn["lengths"]["edges"]), drawn["lengths"]["shares"],
        [f"all {spread['max']:.0f}" if spread["min"] == spread["max"] else
         f"half <= {at('lengths', 0.5, '{:.0f}')}, 99 % <= {at('lengths', 0.99, '{:.0f}')}"],
    )  # fmt: skip
    yield ""
    yield from join_side_by_side(k, lengths)
    if not shapes["mass"]:
        return
    edges = [100 * edge for edge in drawn["missing"]["edges"]]
    mass = draw_histogram(
        "mass outside the list, %", label_bins(edges), drawn["missing"]["shares"],
        [f"half <= {_bound_missing_mass(shapes, 0.5)}, 95 % <= {_bound_missing_mass(shapes, 0.05)}"],
    )  # fmt: skip
    entropy = []
    if shapes["entropy"]:
        entropy = draw_histogram(
            "entropy in nats, at least", label_bins(drawn["entropy"]["edges"]), drawn["entropy"]["shares"],
            [f"half <= {at('entropy', 0.5, '{:.3g}')}, 95 % <= {at('entropy', 0.95, '{:.3g}')}"],
        )  # fmt: skip
    yield ""
    yield from join_side_by_side(mass, entropy)
    holes = f"; {shapes['holes']:,} without a list" if shapes["holes"] else ""
    yield ""
    yield f"mass and entropy of {shapes['rows']:,} positions of {shapes['scores']:,} scores{holes}"


def _bound_missing_mass(shapes: dict[str, Any], quantile: float) -> str:
    """Format the largest mass outside the lists at a share of the positions."""
    return f"{100 * max(0.0, 1 - shapes['mass'][shapes['quantiles'].index(quantile)]):.2g} %"


def count_things(count: int, thing: str) -> str:
    """Format a count with its noun in singular or plural."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _format_columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Format a table in 80 columns; long names are cut."""
    rows = [(row[0], _cut_text(row[1], _REVISION), *row[2:]) for row in rows]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    room = min(widths[0], max(_WIDTH - sum(2 + width for width in widths[1:]), len(head[0])))
    for name, revision, *numbers in [head, *rows]:
        shown = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[2:], strict=True))
        yield f"{_cut_text(name, room):<{room}}  {revision:<{widths[1]}}  {shown}".rstrip()


def _cut_text(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]


def draw_histogram(title: str, labels: Sequence[str], shares: Sequence[float], notes: Sequence[str] = ()) -> list[str]:
    """Draw a title, a bar for each label (the largest share fills the width), and notes below."""
    widest = max((len(label) for label in labels), default=0)
    room, top = _PICTURE - widest - 8, max(shares, default=0.0) or 1.0
    lines = [title[:_PICTURE]]
    for label, share in zip(labels, shares, strict=True):
        lines.append(f"{label:>{widest}} {draw_bar(share / top, room)} {format_share(share):>6}")
    return [*lines, *(note[:_PICTURE] for note in notes)]


def join_side_by_side(left: Sequence[str], right: Sequence[str]) -> Iterator[str]:
    """Join the lines of two histograms."""
    for left_line, right_line in zip_longest(left, right, fillvalue=""):
        yield f"{left_line:<{_PICTURE + 4}}{right_line}".rstrip()


def draw_bar(share: float, width: int) -> str:
    """Draw a bar in steps of an eighth of a column; a share above zero has at least one eighth."""
    eighths = round(8 * width * max(0.0, min(1.0, share)))
    if share > 0:
        eighths = max(eighths, 1)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return ("#" * max(-(-eighths // 8) if eighths < 8 else eighths // 8, 0)).ljust(width)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def format_share(share: float) -> str:
    """Format a share; only exactly 0 and 1 are shown as 0 % and 100 %."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return "<0.1 %" if share < 0.5 else ">99.9%"
    return f"{100 * share:.0f} %" if share >= 0.1 or not share else f"{100 * share:.1f} %"


def label_bins(edges: Sequence[float], show: str = "{:g}") -> list[str]:
    """Label the bins between edges; the last bin has no upper edge."""
    shown = [show.format(edge) for edge in edges]
    return [*(f"{low} to {high}" for low, high in pairwise(shown)), f"{shown[-1]} and up"]


def label_counts(edges: Sequence[float]) -> list[str]:
    """Label bins of whole numbers; the upper edge is not in the bin."""
    whole = [int(edge) for edge in edges]
    bins = (str(low) if high == low + 1 else f"{low} to {high - 1}" for low, high in pairwise(whole))
    return [*bins, f"{whole[-1]} and up"]
