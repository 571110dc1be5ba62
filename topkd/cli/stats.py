"""What ``topkd cache stats`` shows, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from topkd.cli.pictures import between, counts, histogram, side_by_side

_BARS = 8  # of the picture of K


def described(found: dict[str, Any], shapes: dict[str, Any]) -> Iterator[str]:
    """What a cache holds, line by line: counts, whose records, and pictures of K, lengths, missing mass and entropy.

    Args:
        found: ``offline.stats`` as a mapping.
        shapes: ``offline.profile``.
    """
    per_token = "" if found["bytes_per_token"] is None else f", {found['bytes_per_token']:.1f} a token"
    yield f"{found['scores']:,} scores and {found['rollouts']:,} rollouts, {found['tokens']:,} tokens"
    segments = f"{found['segments']} segment{'' if found['segments'] == 1 else 's'}, {found['sealed']} sealed"
    yield f"{found['bytes']:,} bytes{per_token}; {segments}"
    if found["records"] > found["live"]:
        yield f"{found['records'] - found['live']} records are superseded; topkd cache gc drops them"
    if found["teachers"]:
        yield ""
        yield from _columns(
            ("TEACHERS, AND POLICIES THAT WERE SAMPLED", "revision", "records", "tokens"),
            [(one["name"], one["revision"] or "-", f"{one['records']:,}", f"{one['tokens']:,}")
             for one in found["teachers"]],
        )  # fmt: skip
    if not shapes["scores"]:
        return
    drawn, quantile = shapes["histograms"], {q: at for at, q in enumerate(shapes["quantiles"])}

    def at(name: str, share: float, show: str) -> str:
        return show.format(shapes[name][quantile[share]])

    total = sum(found["k"].values())
    asked = sorted(found["k"].items())
    if len(asked) > _BARS:
        asked = [*asked[: _BARS - 1], (-1, sum(number for _, number in asked[_BARS - 1 :]))]
    k = histogram("K of the scores", ["wider" if k < 0 else str(k) for k, _ in asked], [n / total for _, n in asked])
    lengths = histogram(
        "positions of a score", counts(drawn["lengths"]["edges"]), drawn["lengths"]["shares"],
        [f"half below {at('lengths', 0.5, '{:.0f}')}, 99 % below {at('lengths', 0.99, '{:.0f}')}"],
    )  # fmt: skip
    yield ""
    yield from side_by_side(k, lengths)
    if not shapes["mass"]:
        return
    edges = [100 * edge for edge in drawn["missing"]["edges"]]
    mass = histogram(
        "mass outside the list, %", between(edges), drawn["missing"]["shares"],
        [f"half below {_missing(shapes, 0.5)}, 95 % below {_missing(shapes, 0.05)}"],
    )  # fmt: skip
    entropy = []
    if shapes["entropy"]:
        entropy = histogram(
            "entropy in nats, at least", between(drawn["entropy"]["edges"]), drawn["entropy"]["shares"],
            [f"half below {at('entropy', 0.5, '{:.3g}')}, 95 % below {at('entropy', 0.95, '{:.3g}')}"],
        )  # fmt: skip
    yield ""
    yield from side_by_side(mass, entropy)
    holes = f"; {shapes['holes']:,} without a list" if shapes["holes"] else ""
    yield ""
    yield f"mass and entropy of {shapes['rows']:,} positions of {shapes['scores']:,} scores{holes}"


def _missing(shapes: dict[str, Any], quantile: float) -> str:
    """The share of positions' upper bound on what lies outside: a quantile of the mass, from the other side."""
    return f"{100 * max(0.0, 1 - shapes['mass'][shapes['quantiles'].index(quantile)]):.2g} %"


def _columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """A table without lines, cut to 80 columns; names on the left, numbers on the right."""
    rows = [(_cut(row[0], 36), _cut(row[1], 22), *row[2:]) for row in rows]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        name, revision, *numbers = row
        shown = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[2:], strict=True))
        yield f"{name:<{min(widths[0], 40)}}  {revision:<{widths[1]}}  {shown}".rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]
