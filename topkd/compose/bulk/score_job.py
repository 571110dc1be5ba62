"""The job of ``score``: teachers with the cache before them, and the rows that are scored by each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import islice
from typing import Protocol

from topkd.compose.bulk.job import CHUNK, BulkJob
from topkd.compose.bulk.score_config import ScoreConfig, ScoreReport, TeacherAddress
from topkd.compose.bulk.selection import Claim, Selection, digest_sequence
from topkd.compose.bulk.spending import SpendingLimit
from topkd.compose.cache.identity import GIVEN, build_served_identity
from topkd.compose.data.sequences import BadRow, Item, ScoreInput
from topkd.compose.progress import Progress
from topkd.compose.teachers.served import OpenTeacher, open_teacher
from topkd.offline import CachingScorer, ScoreStore, TeacherIdentity
from topkd.topk.errors import DataError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK


class RequestBudget(Protocol):
    """Decides which rows may be asked for."""

    @property
    def reached(self) -> str:
        """The cap that a ``Claim.CAP`` is about."""
        ...

    async def claim(self, requests: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """Decide for each request, by the digest of its sequence and the tokens that it sends."""
        ...


class LocalBudget:
    """The budget of a job in this process alone."""

    def __init__(self, limit: SpendingLimit) -> None:
        self.limit = limit

    @property
    def reached(self) -> str:
        """The cap that was reached."""
        return self.limit.reached

    async def claim(self, requests: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """See ``RequestBudget``."""
        return [claim_tokens(self.limit, tokens) for _, tokens in requests]


def claim_tokens(limit: SpendingLimit, tokens: int) -> Claim:
    """Take the tokens of a row; after the first row that does not fit, none is asked for."""
    return Claim.ASK if not limit.reached and limit.take(tokens) else Claim.CAP


class TeacherQueue:
    """One teacher of a job, with the cache before it.

    Args:
        teacher: Connected and checked.
        store: Open for appending.
        identity: The teacher as the cache knows it.
    """

    def __init__(self, teacher: OpenTeacher, store: ScoreStore, identity: TeacherIdentity) -> None:
        self.teacher, self.identity, self.live = teacher, identity, _CountingScorer(teacher.scorer)
        self.scorer = CachingScorer(self.live, store, identity)


class ScoreJob(BulkJob[tuple[Item, bool], ScoreInput, TopK]):
    """Scores the selected rows.

    Args:
        config: Of the job.
        report: Filled in.
        progress: Shows the counts.
        store: Open for appending.
        queues: The teachers, by the teacher_id of their rows.
        budget: Decides which rows may be asked for: the caps, and the claims of other workers.
    """

    stage = "score"

    def __init__(
        self,
        config: ScoreConfig,
        *,
        report: ScoreReport,
        progress: Progress,
        store: ScoreStore,
        queues: Mapping[str, TeacherQueue],
        budget: RequestBudget,
    ) -> None:
        super().__init__(report, progress, store, in_flight=config.in_flight, strict=config.strict)
        self.config, self.report, self.queues, self.budget = config, report, queues, budget

    async def score(self, selection: Selection) -> None:
        """Score the rows of a selection."""
        self.selection, self.items = selection, iter(selection)
        await self.run(await asyncio.to_thread(selection.estimate_rows))

    def read_chunk(self) -> list[tuple[Item, bool]]:
        """Read rows, each with whether the cache has its scores."""
        return [(item, self._is_cached(item)) for item in islice(self.items, CHUNK)]

    async def start_chunk(self, chunk: Sequence[tuple[Item, bool]]) -> bool:
        """Start the requests that the budget allows."""
        report = self.report
        report.duplicates, report.skipped = self.selection.duplicates, self.selection.skipped
        items = [item for item, is_cached in chunk if self._needs_request(item, is_cached=is_cached)
                 and isinstance(item, ScoreInput)]  # fmt: skip
        # A request sends its sequence, and generates one token.
        requests = [(digest_sequence(item), int(item.ids.size) + 1) for item in items]
        claims = await self.budget.claim(requests) if requests else []
        for item, claim in zip(items, claims, strict=True):
            if claim is Claim.CAP:
                report.stopped = self.budget.reached
                return False
            report.rows += 1
            if claim is Claim.ELSEWHERE:
                self._count_elsewhere(item)
                continue
            await self.wait_for_slot()
            self.start(item)
        return True

    async def ask(self, row: ScoreInput) -> TopK:
        """Score a row."""
        return await self._queue(row).scorer.score(row.ids, row.start, self.config.k)

    async def record(self, row: ScoreInput, reply: TopK) -> None:
        """Count the scores; the scorer has stored them."""
        self.report.positions += reply.rows
        self._store_rollout(row)

    def count_progress(self) -> tuple[int, int]:
        """Return rows that are done and tokens that were sent."""
        report = self.report
        done = report.cached + report.refused + report.failed + report.duplicates + report.skipped + self.replies
        return done, sum(queue.live.tokens for queue in self.queues.values())

    def complete_report(self) -> None:
        """Add the totals that follow from the counters."""
        report, scorers = self.report, [queue.live for queue in self.queues.values()]
        report.scored = sum(scorer.replies for scorer in scorers)
        report.tokens_sent = sum(scorer.tokens for scorer in scorers)
        report.cached += self.replies - report.scored
        caches = [queue.scorer.metrics for queue in self.queues.values()]
        report.saved_tokens += sum(metrics.saved_tokens + metrics.hits + metrics.joined for metrics in caches)

    def _queue(self, item: ScoreInput) -> TeacherQueue:
        return self.queues[item.teacher_id]

    def _is_cached(self, item: Item) -> bool:
        """Read the row's scores from the cache, so that a damaged record is asked for again."""
        if isinstance(item, BadRow):
            return False
        return self.store.covers(self._queue(item).identity, item.ids, item.start, self.config.k, read=True)

    def _needs_request(self, item: Item, *, is_cached: bool) -> bool:
        """Return whether a row must be asked for; any other row is counted here."""
        report = self.report
        if isinstance(item, BadRow):
            self.failures.refuse(item.number, item.reason)
        else:
            size, context = int(item.ids.size), self._queue(item).teacher.context
            if context is not None and size + 1 > context:
                self.failures.refuse(item.number, DataError(
                    "a row is longer than the server's context", where=f"{self.config.data}:{item.number}",
                    got=f"{size} tokens and one to generate", expected=f"at most {context}",
                ))  # fmt: skip
            elif is_cached:
                report.cached += 1
                report.saved_tokens += size + 1
                report.positions += size - 1 - item.start
                self._store_rollout(item)
            else:
                return True
        report.rows += 1
        return False

    def _count_elsewhere(self, item: ScoreInput) -> None:
        """Count a row whose equal is asked for, and stored, by another worker."""
        if self.config.dedupe:
            self.report.duplicates += 1
            self.report.rows -= 1
            return
        self.report.cached += 1
        self.report.saved_tokens += int(item.ids.size) + 1
        self.report.positions += int(item.ids.size) - 1 - item.start

    def _store_rollout(self, item: ScoreInput) -> None:
        """Store the sampled logprobs of a row beside its scores, so that a replay can train on it off-policy."""
        if item.logp is None or item.prompt_ids is None:
            return
        prompt, completion = item.prompt_ids, item.ids[item.start + 1 :]
        # A sampled rollout is keyed by the seed of its request; one from a data file by a digest of its completion.
        seed = int.from_bytes(hashlib.blake2b(completion.tobytes(), digest_size=4).digest(), "big") >> 1
        params = SamplingParams(max_tokens=int(completion.size), seed=seed)
        source = TeacherIdentity(GIVEN, revision=self.config.data.stem)
        rollout = Rollout(prompt, completion, item.logp, item.finish_reason, params, version="0")
        self.store.put_rollouts(source, prompt, [rollout], params)


class _CountingScorer:
    """A teacher whose replies are counted."""

    def __init__(self, scorer: TeacherScorer) -> None:
        self._scorer = scorer
        self.replies = self.tokens = 0

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """See ``TeacherScorer.score``."""
        rows = await self._scorer.score(ids, start, k)
        self.replies += 1
        self.tokens += len(ids) + 1
        return rows


def build_queues(
    config: ScoreConfig, teachers: Mapping[str, OpenTeacher], store: ScoreStore
) -> dict[str, TeacherQueue]:
    """Put the cache before each open teacher; by the teacher_id of its rows."""
    revisions = {name: address.revision for name, address in config.addresses().items()}
    return {name: TeacherQueue(teacher, store, build_served_identity(store, teacher.name, revisions[name]))
            for name, teacher in teachers.items()}  # fmt: skip


def open_job_teacher(config: ScoreConfig, address: TeacherAddress) -> AbstractAsyncContextManager[OpenTeacher]:
    """Open one of the job's teachers."""
    return open_teacher(
        address.urls,
        dialect=config.dialect,
        model=address.model,
        api_key=config.api_key,
        config=config.client,
        vocab_size=address.vocab_size,
        k=config.k,
        engine=config.engine,
    )
