"""Formats counts and numbers of bytes in three digits."""

from __future__ import annotations

_TO_THE_NEXT = 0.9995  # from this share of a unit on, three digits would round to 1000 of the smaller unit


def format_count(number: int) -> str:
    """Format a count: in full below ten thousand (9,999), else in larger units (12 k, 1.54 B)."""
    if number < 10_000:
        return f"{number:,}"
    unit, factor = next(
        (unit, factor) for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)) if number >= _TO_THE_NEXT * factor
    )  # fmt: skip
    return f"{number / factor:.3g} {unit}"


def format_bytes(number: float) -> str:
    """Format bytes in powers of a thousand: 512 B, 64.5 kB, 1.25 GB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= _TO_THE_NEXT * factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
