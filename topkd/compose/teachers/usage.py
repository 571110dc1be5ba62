"""What a step cost its teachers: requests, retries, cache hits, tokens and bytes, summed over all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from topkd.engine.learner.distributed import Ranks

# Fields that depend on the network and on what a cache held, not on what was learnt: a run that is repeated or resumed
# may differ in these and in timings, and in nothing else.
FIELDS = ("requests", "retries", "failed_requests", "cache_hits", "scored_tokens", "teacher_bytes")
_CLIENT = {
    "tries": "requests",
    "retries": "retries",
    "failed_requests": "failed_requests",
    "scored_rows": "scored_tokens",
    "reply_bytes": "teacher_bytes",
}


class TeacherUsage:
    """Counters of every teacher of a run, read as the difference since the last reading.

    ``requests`` are HTTP exchanges (tries), ``retries`` those after a first one, ``failed_requests`` requests that were
    given up, ``scored_tokens`` rows that servers returned (nothing for a cache hit), ``teacher_bytes`` reply bodies.
    What happened is booked to the step whose record is written next: with scores in flight, that is not always the step
    they are for.
    """

    def __init__(self) -> None:
        self._meters: list[tuple[Callable[[], Mapping[str, float]], Mapping[str, str]]] = []
        self._booked: Counter[str] = Counter()

    def client(self, meter: Callable[[], Mapping[str, float]]) -> None:
        """Counts a client's ``metrics`` from now on: meeting the server is no part of any step."""
        self._add(meter, _CLIENT)

    def cache(self, meter: Callable[[], Mapping[str, float]]) -> None:
        """Counts the hits of a caching scorer; one that joined a request under way is a hit too."""
        self._add(meter, {"hits": "cache_hits", "joined": "cache_hits"})

    def since_last(self) -> dict[str, int]:
        """Every field of ``FIELDS``."""
        now = self._sums()
        found = {name: round(now[name] - self._booked[name]) for name in FIELDS}
        self._booked = now
        return found

    async def sum_over(self, ranks: Ranks | None) -> dict[str, int]:
        """Return every field of ``FIELDS`` since the last reading, summed over the run's processes."""
        counts = self.since_last()
        if ranks is None:
            return counts
        every = await asyncio.to_thread(ranks.gather, counts)
        return {name: sum(part[name] for part in every) for name in FIELDS}

    def _add(self, meter: Callable[[], Mapping[str, float]], names: Mapping[str, str]) -> None:
        self._meters.append((meter, names))
        self._booked = self._sums()

    def _sums(self) -> Counter[str]:
        sums: Counter[str] = Counter()
        for meter, names in self._meters:
            found = meter()
            for theirs, ours in names.items():
                sums[ours] += found.get(theirs, 0)  # type: ignore[assignment]  # Counter is typed for int
        return sums
