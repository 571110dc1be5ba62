"""Teacher scorers that answer from the cache."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass

from topkd.offline.store.codecs import narrow_scores
from topkd.offline.store.keys import TeacherIdentity, check_token_array, compute_score_key
from topkd.offline.store.store import ScoreStore
from topkd.topk.errors import CacheError, CacheMissError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.types import Int32, TopK


@dataclass(slots=True)
class CacheMetrics:
    """Counts of cache hits, misses and shared requests.

    Attributes:
        hits: Answered from the store.
        misses: Sent to the teacher or the sampler.
        joined: Waited for an equal or wider request that was already in progress.
        saved_tokens: Tokens that hits and joined requests did not need to send (scores) or sample (rollouts).
        asked_tokens: Tokens that misses sent or sampled.
    """

    hits: int = 0
    misses: int = 0
    joined: int = 0
    saved_tokens: int = 0
    asked_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return plain numbers for a step record."""
        return asdict(self)


@dataclass(slots=True)
class _Request:
    """A request to the teacher in progress, and how many callers wait for it."""

    start: int
    k: int
    task: asyncio.Task[TopK]
    waiting: int = 0


class CachingScorer:
    """A TeacherScorer that requests from its teacher only the scores that the store lacks.

    A smaller K or a later start than what is stored is a hit; a larger K is a miss, and its answer replaces the stored
    one. Concurrent misses for one key become one request. A miss returns what the store will return from then on, so a
    run and its replay see the same numbers. A failed request is not stored, and fails for all callers that wait for it.

    Args:
        scorer: The live teacher.
        store: Open for appending.
        identity: The teacher's identity, which is part of every key.
        refresh_s: Least seconds between two looks, on a miss, for what other processes have written.
    """

    def __init__(
        self, scorer: TeacherScorer, store: ScoreStore, identity: TeacherIdentity, *, refresh_s: float = 5.0
    ) -> None:
        self._scorer, self._store, self.identity = scorer, store, identity
        self.metrics = CacheMetrics()
        self._requests: dict[bytes, list[_Request]] = {}
        self._refresh_s, self._refreshed = refresh_s, time.monotonic()

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Return the scores of ``ids`` (see ``TeacherScorer.score``)."""
        array = check_token_array(ids)
        stored = self._read_stored(array, start, k)
        if stored is not None:
            self.metrics.hits += 1
            self.metrics.saved_tokens += array.size
            return stored
        requests = self._requests.setdefault(compute_score_key(self.identity, array), [])
        request = next((f for f in requests if f.start <= start and f.k >= k and not f.task.done()), None)
        if request is None:
            self.metrics.misses += 1
            self.metrics.asked_tokens += array.size
            request = _Request(start, k, asyncio.create_task(self._fetch(array, start, k)))
            requests.append(request)
            request.task.add_done_callback(lambda _: self._forget_finished(array))
        else:
            self.metrics.joined += 1
            self.metrics.saved_tokens += array.size
        return narrow_scores(await _wait_for(request), start, k)

    def _read_stored(self, ids: Int32, start: int, k: int) -> TopK | None:
        found = self._store.get(self.identity, ids, start, k)
        now = time.monotonic()
        if found is None and now - self._refreshed > self._refresh_s:
            self._refreshed = now
            self._store.refresh()
            found = self._store.get(self.identity, ids, start, k)
        return found

    async def _fetch(self, ids: Int32, start: int, k: int) -> TopK:
        scores = await self._scorer.score(ids, start, k)
        # In a thread: a commit waits for the disk.
        await asyncio.to_thread(self._store.put, self.identity, ids, scores, asked=k)
        stored = self._store.get(self.identity, ids, start, k)
        if stored is None:
            raise CacheError("a score that was just written cannot be read", where=str(self._store.path))
        return stored

    def _forget_finished(self, ids: Int32) -> None:
        key = compute_score_key(self.identity, ids)
        unfinished = [request for request in self._requests.get(key, ()) if not request.task.done()]
        if unfinished:
            self._requests[key] = unfinished
        else:
            self._requests.pop(key, None)


class ReplayScorer:
    """A TeacherScorer that answers from the store only and raises CacheMissError."""

    def __init__(self, store: ScoreStore, identity: TeacherIdentity) -> None:
        self._store, self.identity = store, identity
        self.metrics = CacheMetrics()

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Return the stored scores of ``ids`` (see ``TeacherScorer.score``)."""
        array = check_token_array(ids)
        found = self._store.get(self.identity, array, start, k)
        if found is None:
            self._store.refresh()
            found = self._store.get(self.identity, array, start, k)
        if found is None:
            self.metrics.misses += 1
            raise self._make_miss_error(array, start, k)
        self.metrics.hits += 1
        self.metrics.saved_tokens += array.size
        return found

    def _make_miss_error(self, ids: Int32, start: int, k: int) -> CacheMissError:
        list_stored = self._store.list_stored(self.identity, ids)
        if list_stored:
            got = ", ".join(f"K {asked} from position {first}" for first, asked in list_stored)
            hint = "score again with this K and start, or request what is there"
            if any(first <= start and asked >= k for first, asked in list_stored):
                got, hint = f"a damaged record ({got})", "run `topkd cache verify`, then score again"
        else:
            got, hint = "no record of these ids", "score this data with this teacher first, or check its identity"
        return CacheMissError(
            "the cache does not have the score",
            where=f"{self._store.path}, teacher {self.identity.name!r} revision {self.identity.revision!r}, "
            f"{ids.size} tokens, first {ids[:6].tolist()}",
            got=got,
            expected=f"K {k} from position {start}",
            hint=hint,
        )


async def _wait_for(request: _Request) -> TopK:
    """Wait for a request; cancel it when its last caller is cancelled."""
    request.waiting += 1
    try:
        return await asyncio.shield(request.task)
    finally:
        request.waiting -= 1
        if not request.waiting and not request.task.done():
            request.task.cancel()
