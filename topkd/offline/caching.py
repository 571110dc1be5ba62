"""Scorers and samplers that remember: a hit never reaches the network, equal requests in flight are asked once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass

from topkd.offline.store.codecs import narrow_scores
from topkd.offline.store.keys import TeacherIdentity, check_token_array, score_key
from topkd.offline.store.store import ScoreStore
from topkd.topk.errors import CacheError, CacheMissError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.types import Int32, TopK


@dataclass(slots=True)
class CacheMetrics:
    """What the cache was asked and what it spared.

    Attributes:
        hits: Answered from the store.
        misses: Sent to the teacher or the sampler.
        joined: Waited for an equal or wider request that was already under way.
        saved_tokens: Tokens that hits and joined requests did not send (scores) or did not sample (rollouts).
        asked_tokens: Tokens that misses did send or sample.
    """

    hits: int = 0
    misses: int = 0
    joined: int = 0
    saved_tokens: int = 0
    asked_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain numbers, for a step record."""
        return asdict(self)


@dataclass(slots=True)
class _Flight:
    """A request under way, and how many callers wait for it."""

    start: int
    k: int
    task: asyncio.Task[TopK]
    waiting: int = 0


class CachingScorer:
    """A TeacherScorer that asks its teacher only what the store does not know.

    A narrower K or a later start than what is stored is a hit; a wider K is a miss, and its answer supersedes.
    Concurrent misses for one key become one request. What is returned on a miss is what the store will return from then
    on, so a run and its replay see the same numbers. A failed request is not remembered, and fails all who wait for it.

    Args:
        scorer: The live teacher.
        store: Open for appending.
        identity: Who the teacher is; it decides what counts as the same.
        refresh_s: How often at most a miss looks for what other processes have written.
    """

    def __init__(
        self, scorer: TeacherScorer, store: ScoreStore, identity: TeacherIdentity, *, refresh_s: float = 5.0
    ) -> None:
        self._scorer, self._store, self.identity = scorer, store, identity
        self.metrics = CacheMetrics()
        self._flights: dict[bytes, list[_Flight]] = {}
        self._refresh_s, self._refreshed = refresh_s, time.monotonic()

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """As ``TeacherScorer.score``."""
        array = check_token_array(ids)
        found = self._look(array, start, k)
        if found is not None:
            self.metrics.hits += 1
            self.metrics.saved_tokens += array.size
            return found
        flights = self._flights.setdefault(score_key(self.identity, array), [])
        flight = next((f for f in flights if f.start <= start and f.k >= k and not f.task.done()), None)
        if flight is None:
            self.metrics.misses += 1
            self.metrics.asked_tokens += array.size
            flight = _Flight(start, k, asyncio.create_task(self._ask(array, start, k)))
            flights.append(flight)
            flight.task.add_done_callback(lambda _: self._landed(array))
        else:
            self.metrics.joined += 1
            self.metrics.saved_tokens += array.size
        return narrow_scores(await _wait(flight), start, k)

    def _look(self, ids: Int32, start: int, k: int) -> TopK | None:
        found = self._store.get(self.identity, ids, start, k)
        now = time.monotonic()
        if found is None and now - self._refreshed > self._refresh_s:
            self._refreshed = now
            self._store.refresh()
            found = self._store.get(self.identity, ids, start, k)
        return found

    async def _ask(self, ids: Int32, start: int, k: int) -> TopK:
        scores = await self._scorer.score(ids, start, k)
        # Off the loop: a commit waits for the disk.
        await asyncio.to_thread(self._store.put, self.identity, ids, scores, asked=k)
        stored = self._store.get(self.identity, ids, start, k)
        if stored is None:
            raise CacheError("a score that was just written cannot be read", where=str(self._store.path))
        return stored

    def _landed(self, ids: Int32) -> None:
        key = score_key(self.identity, ids)
        flying = [flight for flight in self._flights.get(key, ()) if not flight.task.done()]
        if flying:
            self._flights[key] = flying
        else:
            self._flights.pop(key, None)


class ReplayScorer:
    """A TeacherScorer without a teacher: what the store does not know is a CacheMissError."""

    def __init__(self, store: ScoreStore, identity: TeacherIdentity) -> None:
        self._store, self.identity = store, identity
        self.metrics = CacheMetrics()

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """As ``TeacherScorer.score``."""
        array = check_token_array(ids)
        found = self._store.get(self.identity, array, start, k)
        if found is None:
            self._store.refresh()
            found = self._store.get(self.identity, array, start, k)
        if found is None:
            self.metrics.misses += 1
            raise self._miss(array, start, k)
        self.metrics.hits += 1
        self.metrics.saved_tokens += array.size
        return found

    def _miss(self, ids: Int32, start: int, k: int) -> CacheMissError:
        held = self._store.held(self.identity, ids)
        if held:
            got = ", ".join(f"K {asked} from position {first}" for first, asked in held)
            hint = "score again with this K and start, or ask for what is there"
            if any(first <= start and asked >= k for first, asked in held):
                got, hint = f"a damaged record ({got})", "run `topkd cache verify`, then score again"
        else:
            got, hint = "no record of these ids", "score this data with this teacher first, or check its identity"
        return CacheMissError(
            "the cache cannot answer",
            where=f"{self._store.path}, teacher {self.identity.name!r} revision {self.identity.revision!r}, "
            f"{ids.size} tokens, first {ids[:6].tolist()}",
            got=got,
            expected=f"K {k} from position {start}",
            hint=hint,
        )


async def _wait(flight: _Flight) -> TopK:
    """The flight's result; it goes on as long as one caller waits, and is cancelled with the last."""
    flight.waiting += 1
    try:
        return await asyncio.shield(flight.task)
    finally:
        flight.waiting -= 1
        if not flight.waiting and not flight.task.done():
            flight.task.cancel()
