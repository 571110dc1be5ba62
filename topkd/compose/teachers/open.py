"""Open all teachers of a run from its config, on servers or in this process, and count their requests per step."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from topkd.compose.cache.rollouts import LiveCache
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import TeacherConfig
from topkd.compose.data.digests import digest_weights
from topkd.compose.preflight.teachers import select_teachers
from topkd.compose.teachers.served import OpenTeacher, open_teacher
from topkd.engine.loop.hooks import Record
from topkd.engine.loop.metrics import TRAFFIC
from topkd.topk.protocols import TeacherScorer

if TYPE_CHECKING:
    from topkd.engine.checkpoint.checkpoint import Stateful
    from topkd.engine.learner.distributed import Ranks
    from topkd.engine.models.local_teacher import SelfTeacher
    from topkd.offline import CachingScorer

Publish: TypeAlias = Callable[[int], Awaitable[Record | None]]


_CLIENT = {
    "tries": "requests",
    "retries": "retries",
    "failed_requests": "failed_requests",
    "scored_rows": "scored_tokens",
    "reply_bytes": "teacher_bytes",
}


class TeacherUsage:
    """Counters of all teachers of a run, read as the difference since the last reading.

    ``requests`` counts HTTP requests (tries), ``retries`` those that repeat another, ``failed_requests`` those that
    failed in the end, ``scored_tokens`` positions that servers returned (0 for a cache hit), ``teacher_bytes`` the size
    of replies. Counts go to the step whose record is written next. If other scores are in flight then, it may not be
    the step that they are for.
    """

    def __init__(self) -> None:
        self._meters: list[tuple[Callable[[], Mapping[str, float]], Mapping[str, str]]] = []
        self._booked: Counter[str] = Counter()

    def client(self, meter: Callable[[], Mapping[str, float]]) -> None:
        """Count a client's ``metrics`` from now on; the requests before the run belong to no step."""
        self._add(meter, _CLIENT)

    def cache(self, meter: Callable[[], Mapping[str, float]]) -> None:
        """Count the hits of a caching scorer; joining a request in flight is a hit too."""
        self._add(meter, {"hits": "cache_hits", "joined": "cache_hits"})

    def since_last(self) -> dict[str, int]:
        """Return every field of ``TRAFFIC``."""
        now = self._sums()
        found = {name: round(now[name] - self._booked[name]) for name in TRAFFIC}
        self._booked = now
        return found

    async def sum_over(self, ranks: Ranks | None) -> dict[str, int]:
        """Return every field of ``TRAFFIC`` since the last reading, summed over the run's processes."""
        counts = self.since_last()
        every = [counts] if ranks is None else await asyncio.to_thread(ranks.gather, counts)
        return {name: sum(part[name] for part in every) for name in TRAFFIC}

    def _add(self, meter: Callable[[], Mapping[str, float]], names: Mapping[str, str]) -> None:
        self._meters.append((meter, names))
        self._booked = self._sums()

    def _sums(self) -> Counter[str]:
        sums: Counter[str] = Counter()
        for meter, names in self._meters:
            found = meter()
            for counter, field_name in names.items():
                sums[field_name] += found.get(counter, 0)  # type: ignore[assignment]  # Counter is typed for int
        return sums


@dataclass(slots=True)
class Teachers:
    """The teachers of a run.

    Attributes:
        scorers: teacher_id -> the scorer for training: the teacher, or the cache in front of it.
        servers: teacher_id -> the teacher's own client, for teachers behind servers.
        models: teacher_id -> the model, for teachers in this process.
        fingerprints: teacher_id -> facts about the teacher, for the run log.
        followers: teacher_id -> the teacher, if its weights follow the student's.
        usage: Counters of requests; None if nothing is counted.
    """

    scorers: dict[str, TeacherScorer] = field(default_factory=dict)
    servers: dict[str, TeacherScorer] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    followers: dict[str, SelfTeacher] = field(default_factory=dict)
    usage: TeacherUsage | None = None

    @property
    def states(self) -> Mapping[str, Stateful]:
        """The teachers whose state a checkpoint must contain."""
        return {f"teacher-{name or 'self'}": teacher for name, teacher in self.followers.items()}

    def add_served(self, name: str, opened: OpenTeacher, revision: str, cache: LiveCache | None) -> None:
        """Add a teacher behind a server, with the cache in front of it, if there is one."""
        usage = self.usage = self.usage or TeacherUsage()
        usage.client(opened.metrics)
        self.servers[name] = opened.scorer
        cached = self._add(name, opened.scorer, opened.fingerprint() | {"revision": revision}, cache)
        if cached is not None:
            usage.cache(cached.metrics.as_dict)

    def add_local(
        self, name: str, table: TeacherConfig, config: RunConfig, student: Any, *, lock: Any, cache: LiveCache | None
    ) -> None:
        """Open a ``local`` or ``self`` teacher in this process, before the student's weights change, and add it."""
        from topkd.engine.models.local_teacher import LocalTeacher, SelfTeacher
        from topkd.engine.models.student import Student

        scorer: LocalTeacher | SelfTeacher
        if table.kind == "self":
            scorer = SelfTeacher(student, table.ema, lock)
            model_name = f"{Path(config.student.model).name} (self)"
            revision = table.revision or (digest_weights(student) if table.ema == 1.0 else "moving")
            if table.ema not in {0.0, 1.0}:
                self.followers[name] = scorer
        else:
            scorer = LocalTeacher(Student.load(str(table.model), config.student.device, config.student.dtype))
            model_name, revision = Path(str(table.model)).name, table.revision or digest_weights(scorer.model)
        self.models[name] = scorer.model
        self._add(name, scorer, {"model": model_name, "revision": revision, "kind": "in this process"}, cache)

    def _add(
        self, name: str, scorer: TeacherScorer, fingerprint: dict[str, Any], cache: LiveCache | None
    ) -> CachingScorer | None:
        self.fingerprints[name], self.scorers[name] = fingerprint, scorer
        if cache is None:
            return None
        cached = self.scorers[name] = cache.scorer(name, scorer, fingerprint["model"], fingerprint["revision"])
        return cached

    def publish_after_step(self, publish: Publish, ranks: Ranks | None = None) -> Publish:
        """Return a ``publish`` that first updates teachers that follow the student, and records all teachers' usage."""
        if not self.followers and self.usage is None:
            return publish
        has_begun = False  # the first call is before any step

        async def publish_version(version: int) -> Record | None:
            nonlocal has_begun
            for teacher in self.followers.values() if has_begun else ():
                await asyncio.to_thread(teacher.follow)
            has_begun = True
            record = await publish(version)
            return record if self.usage is None else (record or {}) | await self.usage.sum_over(ranks)

        return publish_version


@contextlib.asynccontextmanager
async def open_teachers(
    config: RunConfig, student: Any, lock: threading.Lock, cache: LiveCache | None
) -> AsyncIterator[Teachers]:
    """Connect to every teacher server, and load the teachers of this process; ``lock`` is held while weights change."""
    teachers = Teachers(usage=TeacherUsage())
    async with contextlib.AsyncExitStack() as stack:
        for name, table in select_teachers(config).items():
            if table.kind != "server":
                teachers.add_local(name, table, config, student, lock=lock, cache=cache)
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
