"""Many scoring requests as one stream: taken from an iterator as places become free, given back as they complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from topkd.topk.errors import ConfigError, TopkdError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.types import TopK

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Job(Generic[Key]):
    """One sequence to score; ``key`` is the caller's own name for it."""

    key: Key
    ids: Ids
    start: int
    k: int


@dataclass(frozen=True, slots=True)
class Done(Generic[Key]):
    """A job's rows, or the error that lost it: exactly one of the two."""

    key: Key
    topk: TopK | None
    error: TopkdError | None


class Stream(Generic[Key]):
    """Scores jobs with at most ``limit`` under way and yields each exactly once, in the order of completion.

    One lost job never loses the others: it is yielded with its error. ``stop()`` takes no more jobs and lets those
    under way finish; leaving the ``async for`` early, or cancelling it, cancels them.

    >>> async for done in Stream(teacher, jobs):                                              # doctest: +SKIP
    ...     store(done.key, done.topk) if done.topk else report(done.key, done.error)
    """

    def __init__(
        self, scorer: TeacherScorer, jobs: Iterable[Job[Key]] | AsyncIterable[Job[Key]], *, limit: int = 512
    ) -> None:
        if limit < 1:
            raise ConfigError("limit must be at least 1", got=limit)
        self._scorer, self._jobs, self._limit = scorer, jobs, limit
        self._stopped = False
        self.taken = 0

    def stop(self) -> None:
        """No more jobs are taken (what a first Ctrl-C should do)."""
        self._stopped = True

    async def __aiter__(self) -> AsyncIterator[Done[Key]]:
        source = _each(self._jobs)
        running: set[asyncio.Task[Done[Key]]] = set()
        finished: asyncio.Queue[asyncio.Task[Done[Key]]] = asyncio.Queue()
        more = True
        try:
            while True:
                while more and not self._stopped and len(running) < self._limit:
                    job = await anext(source, None)
                    if job is None:
                        more = False
                        break
                    self.taken += 1
                    task = asyncio.create_task(self._score(job))
                    running.add(task)
                    task.add_done_callback(finished.put_nowait)
                if not running:
                    return
                task = await finished.get()
                running.discard(task)
                yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await source.aclose()

    async def _score(self, job: Job[Key]) -> Done[Key]:
        try:
            return Done(job.key, await self._scorer.score(job.ids, job.start, job.k), None)
        except TopkdError as error:
            return Done(job.key, None, error)


async def _each(jobs: Iterable[Job[Key]] | AsyncIterable[Job[Key]]) -> AsyncGenerator[Job[Key], None]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            yield job
    else:
        for job in jobs:
            yield job
