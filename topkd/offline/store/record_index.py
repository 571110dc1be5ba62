"""Index of the records a process knows: sorted for sealed segments, a dictionary for growing ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from topkd.offline.store.index import MergedIndex, Place, SortedIndex, split_key

_FEW = 4  # sorted indexes that are searched one by one without a thought


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
        """Drop what ``add`` took from a segment that now has an index."""
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
        # Searching a segment costs about 1 us, joining a record about 0.1 us: join once the searches have paid for it.
        self._searches += len(self._single)
        parts = self._merged_parts + self._single
        if self._searches * 10 >= sum(len(index.high) for _, index in parts):
            self._joined, self._merged_parts, self._single, self._searches = MergedIndex(parts), parts, [], 0
