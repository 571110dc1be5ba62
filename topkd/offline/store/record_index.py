"""Which records a process knows of: sorted indexes of sealed segments, a dictionary for what is still growing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from topkd.offline.store.index import JoinedIndex, Place, SortedIndex, key_halves

_FEW = 4  # sorted indexes that are searched one by one without a thought


class RecordIndex:
    """From key to places. Not thread-safe: the store holds its lock."""

    def __init__(self) -> None:
        self._fresh: dict[bytes, list[Place]] = {}
        self._single: list[tuple[int, SortedIndex]] = []
        self._joined: JoinedIndex | None = None
        self._joined_parts: list[tuple[int, SortedIndex]] = []
        self._searches = 0

    def add(self, key: bytes, place: Place) -> None:
        """A record of a segment without an index."""
        self._fresh.setdefault(key, []).append(place)

    def add_sorted(self, segment: int, index: SortedIndex) -> None:
        """A sealed segment's records."""
        self._single.append((segment, index))

    def forget(self, segment: int) -> None:
        """Drops what ``add`` brought from a segment (it has an index now)."""
        kept = {key: [place for place in places if place.segment != segment] for key, places in self._fresh.items()}
        self._fresh = {key: places for key, places in kept.items() if places}

    def find(self, key: bytes) -> list[Place]:
        """Every record of a key."""
        places = list(self._fresh.get(key, ()))
        if len(self._single) > _FEW:
            self._join()
        for segment, index in self._single:
            places += index.find(key, segment)
        if self._joined is not None:
            places += self._joined.find(key)
        return places

    def offsets(self, segment: int, kinds: Sequence[int]) -> list[int]:
        """Where a segment without an index has records of these kinds."""
        return sorted(
            place.offset
            for places in self._fresh.values()
            for place in places
            if place.segment == segment and place.kind in kinds
        )

    def count(self, kinds: Sequence[int]) -> int:
        """Number of distinct keys with a record of these kinds."""
        fresh = [key_halves(key) for key, places in self._fresh.items() if any(place.kind in kinds for place in places)]
        pairs = [np.array(fresh, dtype=np.uint64).reshape(-1, 2)]
        for _, index in self._joined_parts + self._single:
            told = np.isin(index.entries["kind"], list(kinds))
            pairs.append(np.stack([index.high[told], index.entries["low"][told]], axis=1))
        return int(np.unique(np.concatenate(pairs), axis=0).shape[0])

    def _join(self) -> None:
        # Searching a segment costs about 1 us, joining a record about 0.1 us: join once the searches have paid for it.
        self._searches += len(self._single)
        parts = self._joined_parts + self._single
        if self._searches * 10 >= sum(len(index.high) for _, index in parts):
            self._joined, self._joined_parts, self._single, self._searches = JoinedIndex(parts), parts, [], 0
