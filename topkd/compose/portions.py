"""A data file in portions that several workers can read, each from where its rows begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

UNIT = 64  # rows between two places where a portion may begin
_UNITS = 16  # of a portion at most
_EACH = 8  # portions a worker at least, so that none waits long for the last


@dataclass(frozen=True, slots=True)
class Portion:
    """Consecutive rows.

    Attributes:
        first: How many rows stand before it.
        rows: How many it has.
        line: Number of its first line (JSONL).
        offset: Byte where that line begins (JSONL).
    """

    first: int
    rows: int
    line: int = 1
    offset: int = 0


def joined(units: Iterator[Portion], *, workers: int, limit: int | None = None) -> list[Portion]:
    """Units of a file, cut at the limit, as portions of a size that keeps all workers busy.

    Args:
        units: In the order of the file.
        workers: How many will share the portions.
        limit: Rows at most.
    """
    kept = []
    for unit in units:
        rows = unit.rows if limit is None else min(unit.rows, limit - unit.first)
        if rows <= 0:
            break
        kept.append(replace(unit, rows=rows))
    size = max(1, min(_UNITS, len(kept) // (_EACH * workers)))
    groups = [kept[at : at + size] for at in range(0, len(kept), size)]
    return [replace(group[0], rows=sum(unit.rows for unit in group)) for group in groups]
