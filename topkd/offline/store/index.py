"""Indexes of records: sorted arrays for each segment, merged when there are many."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from topkd.offline.store.records import Header

ENTRY = np.dtype(
    [
        ("low", "<u8"),
        ("offset", "<u8"),
        ("start", "<u4"),
        ("rows", "<u4"),
        ("width", "<u4"),
        ("asked", "<u4"),
        ("tag", "<u4"),
        ("kind", "u1"),
        ("codec", "u1"),
        ("reserved", "<u2"),
    ]
)
ENTRY_BYTES = 8 + ENTRY.itemsize  # the high half of the key is a separate column
_FEW = 4  # up to this number, sorted indexes are searched one by one


class Place(NamedTuple):
    """The position of one record, and which requests it can answer."""

    segment: int
    offset: int
    kind: int
    start: int
    asked: int
    rows: int


@dataclass(frozen=True, slots=True)
class SortedIndex:
    """The records of one segment in key order. Both arrays may be views of a mapped file."""

    high: NDArray[np.uint64]
    entries: NDArray[Any]

    @classmethod
    def build(cls, found: Iterable[tuple[int, Header]]) -> SortedIndex:
        """Build the index from (offset, header) pairs."""
        rows = [(offset, header, *split_key(header.key)) for offset, header in found]
        rows.sort(key=lambda row: (row[2], row[3], row[0]))
        entries = np.zeros(len(rows), ENTRY)
        for name, column in (
            ("low", [row[3] for row in rows]),
            ("offset", [row[0] for row in rows]),
            *((name, [getattr(row[1], name) for row in rows]) for name in ("start", "rows", "width", "asked", "tag")),
            ("kind", [row[1].kind for row in rows]),
            ("codec", [row[1].codec for row in rows]),
        ):
            entries[name] = np.array(column, dtype=ENTRY[name])
        return cls(np.array([row[2] for row in rows], dtype="<u8"), entries)

    @classmethod
    def from_buffer(cls, payload: memoryview, count: int) -> SortedIndex:
        """Read the arrays that ``to_bytes`` wrote, without a copy."""
        return cls(np.frombuffer(payload, "<u8", count), np.frombuffer(payload, ENTRY, count, 8 * count))

    def to_bytes(self) -> bytes:
        """Return the index as bytes: the high half of every key, then all entries."""
        return self.high.tobytes() + self.entries.tobytes()

    def find(self, key: bytes, segment: int) -> list[Place]:
        """Find every record of a key in this segment."""
        high, low = split_key(key)
        # bisect on a memoryview runs in C on the mapped file and reads about log2(n) of its pages
        column = self.high.data
        row = bisect_left(column, high)
        places = []
        while row < len(column) and column[row] == high:
            entry = self.entries[row].item()
            if entry[0] == low:
                places.append(read_place(entry, segment))
            row += 1
        return places


class MergedIndex:
    """Many sorted indexes merged into one, so that the cost of a look-up does not grow with their number."""

    def __init__(self, parts: Sequence[tuple[int, SortedIndex]]) -> None:
        highs = np.concatenate([part.high for _, part in parts]) if parts else np.zeros(0, np.uint64)
        order = np.argsort(highs, kind="stable")
        self._high = highs[order]
        counts = [len(part.high) for _, part in parts]
        self._part = np.repeat(np.arange(len(parts), dtype=np.uint32), counts)[order]
        first = np.cumsum([0, *counts[:-1]]) if parts else np.zeros(0, np.int64)
        self._row = (order - first[self._part]).astype(np.uint32)
        self._parts = list(parts)

    def find(self, key: bytes) -> list[Place]:
        """Find every record of a key in the merged segments."""
        high, low = split_key(key)
        column = self._high.data
        at = bisect_left(column, high)
        places = []
        while at < len(column) and column[at] == high:
            segment, part = self._parts[self._part[at]]
            entry = part.entries[self._row[at]].item()
            if entry[0] == low:
                places.append(read_place(entry, segment))
            at += 1
        return places


def split_key(key: bytes) -> tuple[int, int]:
    """Split a key into two 64-bit integers that sort in the same order as its bytes."""
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")


def read_place(entry: tuple[int, ...], segment: int) -> Place:
    """Return the place of a record from its index entry."""
    _, offset, start, rows, _, asked, _, kind, _, _ = entry
    return Place(segment, offset, kind, start, asked, rows)


def make_place(segment: int, offset: int, header: Header) -> Place:
    """Return the place of a record from its header."""
    return Place(segment, offset, header.kind, header.start, header.asked, header.rows)


class RecordIndex:
    """Places of records by key. Not thread-safe: the store holds its lock."""

    def __init__(self) -> None:
        self._fresh: dict[bytes, list[Place]] = {}
        self._single: list[tuple[int, SortedIndex]] = []
        self._joined: MergedIndex | None = None
        self._merged_parts: list[tuple[int, SortedIndex]] = []
        self._searches = 0

    def add(self, key: bytes, place: Place) -> None:
        """Add a record of a segment without an index."""
        self._fresh.setdefault(key, []).append(place)

    def add_sorted(self, segment: int, index: SortedIndex) -> None:
        """Add the records of a sealed segment."""
        self._single.append((segment, index))

    def forget(self, segment: int) -> None:
        """Drop the records that ``add`` took from a segment that now has an index."""
        kept = {key: [place for place in places if place.segment != segment] for key, places in self._fresh.items()}
        self._fresh = {key: places for key, places in kept.items() if places}

    def find(self, key: bytes) -> list[Place]:
        """Find every record of a key."""
        places = list(self._fresh.get(key, ()))
        if len(self._single) > _FEW:
            self._join()
        for segment, index in self._single:
            places += index.find(key, segment)
        if self._joined is not None:
            places += self._joined.find(key)
        return places

    def offsets(self, segment: int, kinds: Sequence[int]) -> list[int]:
        """List the offsets of records of these kinds in a segment without an index."""
        return sorted(
            place.offset
            for places in self._fresh.values()
            for place in places
            if place.segment == segment and place.kind in kinds
        )

    def count(self, kinds: Sequence[int]) -> int:
        """Count distinct keys with a record of these kinds."""
        fresh = [split_key(key) for key, places in self._fresh.items() if any(place.kind in kinds for place in places)]
        pairs = [np.array(fresh, dtype=np.uint64).reshape(-1, 2)]
        for _, index in self._merged_parts + self._single:
            wanted = np.isin(index.entries["kind"], list(kinds))
            pairs.append(np.stack([index.high[wanted], index.entries["low"][wanted]], axis=1))
        return int(np.unique(np.concatenate(pairs), axis=0).shape[0])

    def _join(self) -> None:
        # Searching a segment takes about 1 us, merging a record about 0.1 us: merge when the searches have taken as
        # long.
        self._searches += len(self._single)
        parts = self._merged_parts + self._single
        if self._searches * 10 >= sum(len(index.high) for _, index in parts):
            self._joined, self._merged_parts, self._single, self._searches = MergedIndex(parts), parts, [], 0
