"""All teachers of a run, opened from its config."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from topkd.compose.cache.live import LiveCache
from topkd.compose.config.run_config import RunConfig
from topkd.compose.preflight.teachers import select_teachers
from topkd.compose.teachers.local import LocalModel, open_local
from topkd.compose.teachers.served import OpenTeacher, open_teacher
from topkd.compose.teachers.usage import TeacherUsage
from topkd.engine.loop.hooks import Record
from topkd.topk.protocols import TeacherScorer

if TYPE_CHECKING:
    from topkd.engine.checkpoint.checkpoint import Stateful
    from topkd.engine.learner.distributed import Ranks
    from topkd.engine.models.local_teacher import SelfTeacher

Publish: TypeAlias = Callable[[int], Awaitable[Record | None]]


@dataclass(slots=True)
class Teachers:
    """What scores the rollouts of a run.

    Attributes:
        scorers: teacher_id -> what training asks: the teacher, or the cache before it.
        servers: teacher_id -> the teacher's own client, for teachers behind servers.
        models: teacher_id -> the weights, for teachers in this process.
        fingerprints: teacher_id -> who answered, for the run log.
        followers: teacher_id -> teachers that follow the student.
        usage: What the teachers were asked; None where nothing counts it.
    """

    scorers: dict[str, TeacherScorer] = field(default_factory=dict)
    servers: dict[str, TeacherScorer] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    followers: dict[str, SelfTeacher] = field(default_factory=dict)
    usage: TeacherUsage | None = None

    @property
    def states(self) -> Mapping[str, Stateful]:
        """What checkpoints must keep of the teachers."""
        return {f"teacher-{name or 'self'}": teacher for name, teacher in self.followers.items()}

    def add_served(self, name: str, opened: OpenTeacher, revision: str, cache: LiveCache | None) -> None:
        """Add a teacher behind a server, with the cache before it where there is one."""
        usage = self.usage = self.usage or TeacherUsage()
        usage.client(opened.metrics)
        self.fingerprints[name] = opened.fingerprint() | {"revision": revision}
        self.servers[name] = self.scorers[name] = opened.scorer
        if cache is not None:
            cached = cache.scorer(name, opened.scorer, opened.name, revision)
            usage.cache(cached.metrics.as_dict)
            self.scorers[name] = cached

    def add_local(self, name: str, local: LocalModel, cache: LiveCache | None) -> None:
        """Add a teacher in this process, with the cache before it where there is one."""
        self.models[name], self.fingerprints[name] = local.model, local.fingerprint()
        self.scorers[name] = local.scorer
        if cache is not None:
            self.scorers[name] = cache.scorer(name, local.scorer, local.name, local.revision)
        if local.state is not None:
            self.followers[name] = local.state

    def notes(self) -> dict[str, Any]:
        """Return what the run log's first event says of the teachers."""
        return {"teachers": self.fingerprints} if self.fingerprints else {}

    async def after_step(self) -> None:
        """Let the teachers that follow the student take the step too."""
        for teacher in self.followers.values():
            await asyncio.to_thread(teacher.follow)

    def publish_after_step(self, publish: Publish | None, ranks: Ranks | None = None) -> Publish | None:
        """Return ``publish`` with the teachers' step before it, and their usage in the step's record."""
        if publish is None or (not self.followers and self.usage is None):
            return publish
        has_begun = False  # the first call is before any step

        async def publish_version(version: int) -> Record | None:
            nonlocal has_begun
            if has_begun:
                await self.after_step()
            has_begun = True
            record = await publish(version)
            return record if self.usage is None else (record or {}) | await self.usage.sum_over(ranks)

        return publish_version


@contextlib.asynccontextmanager
async def open_teachers(
    config: RunConfig, student: Any, lock: threading.Lock, cache: LiveCache | None
) -> AsyncIterator[Teachers]:
    """Connect to every teacher server, and open the teachers in this process.

    Args:
        config: Of the run.
        student: The loaded student.
        lock: Held by the learner while weights change.
        cache: Answers before the teachers are asked.
    """
    teachers = Teachers(usage=TeacherUsage())
    async with contextlib.AsyncExitStack() as stack:
        for name, table in select_teachers(config).items():
            if table.kind != "server":
                teachers.add_local(name, open_local(table, config, student, lock), cache)
                continue
            opened = await stack.enter_async_context(
                open_teacher(
                    table.urls,
                    dialect=table.dialect,
                    model=table.model,
                    api_key=table.api_key(),
                    config=config.client,
                    vocab_size=table.vocab_size,
                )
            )
            teachers.add_served(name, opened, table.revision, cache)
        yield teachers
