"""Sample batches for the learner on a fixed schedule, and score each at once; staleness limits how many.

The batch of step t is sampled from the weights after step ``max(0, t - max_staleness)``, however fast the servers are:
version v is published, then all batches due from v are sampled, then the pipeline waits for version v + 1. So at most
``max_staleness + 1`` batches wait for the learner, and a slow learner pauses the sampler instead of filling the memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from topkd.engine.loop.hooks import Position, Queued
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.scoring import ScoredBatch
from topkd.topk.samples import Rollout

Drawn: TypeAlias = tuple[list[PromptRow], list[Rollout]]
Draw: TypeAlias = Callable[[int], Awaitable[Drawn]]
Score: TypeAlias = Callable[[Sequence[PromptRow], Sequence[Rollout]], Coroutine[Any, Any, ScoredBatch]]


@dataclass(slots=True)
class InFlight:
    """One step's batch: sampled, and being scored."""

    step: int
    version: int
    versions: tuple[str, ...]
    sample_s: float
    rows: list[PromptRow]
    rollouts: list[Rollout]
    scored: asyncio.Task[ScoredBatch]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Fixed schedule of the sampling, so that a run is deterministic.

    Attributes:
        steps: Number of steps of the run.
        max_staleness: How many versions a batch may be older than the weights that learn from it.
        publish_while_sampling: A version may be published while the last batch of the previous one is being sampled.
    """

    steps: int
    max_staleness: int
    publish_while_sampling: bool = False

    def batches_due(self, version: int) -> int:
        """Count the batches sampled in all, once all batches due from ``version`` are sampled."""
        return min(version + self.max_staleness + 1, self.steps)


class BatchPipeline:
    """Publish weights, and sample and score batches, ahead of the learner.

    Args:
        rows: The run's prompts.
        schedule: Which version each batch is sampled from.
        draw: Samples a step's rollouts, from the version that was published last.
        score: Scores them.
        publish: Sends a version to the sampler; called once per version, in order.
        on_event: Called with each event (a batch that could not be restored after a resume).
        start: The run's position.

    Attributes:
        weights: The newest version that may be published; the learner raises it.
        released: The newest version that may be sampled from; the learner raises it.
        published: The version that was published last.
        sampled: Batches sampled so far, counted from the run's first.
    """

    def __init__(
        self,
        rows: Sequence[PromptRow],
        schedule: Schedule,
        *,
        draw: Draw,
        score: Score,
        publish: Callable[[int], Awaitable[None]],
        on_event: Callable[[dict[str, Any]], None],
        start: Position,
    ) -> None:
        self.schedule, self._rows = schedule, rows
        self._draw, self._score, self._publish, self._on_event = draw, score, publish, on_event
        self._queued = deque(start.queue)
        self._flying: deque[InFlight] = deque()
        self._tasks: list[asyncio.Task[Any]] = []
        self._first = start.step
        self.weights, self.released = WaitableCounter(start.step), WaitableCounter(start.step - 1)
        self._begun = WaitableCounter(start.step - 1)
        self.published, self.sampled = WaitableCounter(start.step - 1), WaitableCounter(start.step)

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start publishing and sampling; the tasks end after the last version, on ``stop``, or with the group."""
        self._tasks += [group.create_task(self._publish_versions()), group.create_task(self._sample_batches(group))]

    def batch(self, step: int) -> InFlight:
        """Return a step's sampled batch, which may still be being scored; it is kept until ``release``."""
        return self._flying[step - self._flying[0].step]

    def release(self, step: int) -> None:
        """Drop the batch of a finished step."""
        while self._flying and self._flying[0].step <= step:
            self._flying.popleft()

    def queue(self, step: int) -> tuple[Queued, ...]:
        """List the batches in flight after ``step`` steps that were sampled from older weights."""
        places = {id(row): place for place, row in enumerate(self._rows)}
        held = []
        for batch in self._flying:
            if batch.step >= step > batch.version:
                found = [places.get(id(row)) for row in batch.rows]
                known = tuple(place for place in found if place is not None)
                held.append(
                    Queued(
                        batch.step, batch.version, batch.versions, batch.sample_s,
                        known if len(known) == len(found) else None, tuple(batch.rollouts),
                    )
                )  # fmt: skip
        return (*held, *self._queued)

    def stop(self) -> None:
        """Cancel all work in progress, and start no more."""
        for task in self._tasks:
            task.cancel()

    async def _publish_versions(self) -> None:
        """Publish each version once its predecessor's batches are sampled (or begun, with publish_while_sampling)."""
        for version in range(self._first, self.schedule.steps + 1):
            await self.weights.wait_for(version)
            if self.schedule.publish_while_sampling:
                await self._begun.wait_for(version - 1)
            elif version > self._first:
                await self.sampled.wait_for(self.schedule.batches_due(version - 1))
            await self._publish(version)
            self.published.advance_to(version)

    async def _sample_batches(self, group: asyncio.TaskGroup) -> None:
        for version in range(self._first, self.schedule.steps):
            await self.published.wait_for(version)
            await self.released.wait_for(version)
            while (step := self.sampled.value) < self.schedule.batches_due(version):
                drawn = asyncio.ensure_future(self._sample_batch(group, step, version))
                try:
                    await asyncio.sleep(0)  # sampling chooses its version before its first await
                    if step + 1 == self.schedule.batches_due(version):
                        self._begun.advance_to(version)
                    await drawn
                finally:
                    drawn.cancel()
            self._begun.advance_to(version)

    async def _sample_batch(self, group: asyncio.TaskGroup, step: int, version: int) -> None:
        began = time.perf_counter()
        known = self._queued[0] if self._queued and self._queued[0].step == step else None
        if known is not None and known.rollouts is not None and known.places is not None:
            rows, rollouts = [self._rows[place] for place in known.places], list(known.rollouts)
        else:
            rows, rollouts = await self._draw(step)
        versions = tuple(sorted({rollout.version for rollout in rollouts}, key=lambda v: (len(v), v)))
        sample_s = time.perf_counter() - began
        if known is not None:
            self._queued.popleft()
            if versions == known.versions:
                version, sample_s = known.version, known.sample_s
            else:  # the cache has lost them: they were sampled again, from newer weights
                self._on_event(
                    {"event": "redrawn", "step": step + 1, "versions": [*known.versions], "now": [*versions]}
                )
        scored = group.create_task(self._score(rows, rollouts))
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(scored)
        self._flying.append(InFlight(step, version, versions, sample_s, rows, rollouts, scored))
        self.sampled.advance_to(step + 1)


class WaitableCounter:
    """A value that only grows, and that tasks can wait for."""

    def __init__(self, value: int) -> None:
        self.value = value
        self._moved = asyncio.Event()

    def advance_to(self, value: int) -> None:
        """Raise the value and wake its waiters."""
        if value > self.value:
            self.value = value
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    async def wait_for(self, value: int) -> None:
        """Wait until the value is at least ``value``."""
        while self.value < value:
            await self._moved.wait()
