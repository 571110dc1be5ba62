"""The job of ``score``: it selects rows, and scores each with its teacher, through the cache."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from topkd.compose.bulk.config import ScoreConfig, ScoreReport, TeacherAddress
from topkd.compose.bulk.job import CHUNK, BulkJob, Claim
from topkd.compose.cache.identity import GIVEN, build_served_identity
from topkd.compose.data.files import RowChunk, count_rows
from topkd.compose.data.sequences import BadRow, Item, ScoreInput, read_sequences
from topkd.compose.progress import Progress
from topkd.compose.teachers.served import IN_PROCESS, OpenTeacher, open_teacher
from topkd.offline import CachingScorer, ScoreStore, TeacherIdentity
from topkd.topk.errors import DataError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK


class RequestBudget(Protocol):
    """Decides which rows may be requested."""

    @property
    def reached(self) -> str:
        """Return the name of the cap behind a ``Claim.CAP``."""
        ...

    async def claim(self, requests: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """Decide on each request, given as the digest of its sequence and the number of tokens that it sends."""
        ...


class Selection:
    """The rows within the limit that belong to this shard, with ``dedupe`` without duplicates.

    The row number decides the shard of a row; with ``dedupe`` its content does, so that equal rows are in one shard.

    Args:
        config: Config of the job.
        tokenizer: Tokenizer for rows of text.
        chunk: Select only from these rows of the data.
    """

    def __init__(self, config: ScoreConfig, tokenizer: Any, chunk: RowChunk | None = None) -> None:
        self.config, self.tokenizer, self.chunk = config, tokenizer, chunk
        self.duplicates = self.skipped = 0
        self._teachers = config.addresses()
        self._sizes = {name: _read_vocab_size(address) for name, address in self._teachers.items()}

    def __iter__(self) -> Iterator[Item]:
        config, seen = self.config, set[bytes]()
        self.duplicates = self.skipped = 0
        shard, shards = config.shard
        rows = read_sequences(config.data, self.tokenizer, self.chunk)
        first = 0 if self.chunk is None else self.chunk.first
        limit = config.limit if self.chunk is None else None  # no chunk goes beyond the limit
        for row, item in enumerate(islice(rows, limit), first):
            digest = digest_sequence(item) if config.dedupe and isinstance(item, ScoreInput) else None
            shard_key = row if digest is None else int.from_bytes(digest[:8], "little")
            if shard_key % shards != shard - 1:
                continue
            if digest is not None:
                if digest in seen:
                    self.duplicates += 1
                    continue
                seen.add(digest)
            if isinstance(item, ScoreInput) and item.teacher_id not in self._teachers:
                if config.teacher_id:
                    self.skipped += 1
                    continue
                yield self._refuse_teacher(item)
            else:
                yield self._check_vocabulary(item) if isinstance(item, ScoreInput) else item

    def estimate_rows(self) -> int:
        """Estimate the number of rows; return 0 if it is not known."""
        rows = count_rows(self.config.data)
        rows = rows if self.config.limit is None else min(rows, self.config.limit)
        return -(-rows // self.config.shard[1])

    @property
    def unbounded(self) -> bool:
        """Return whether a teacher's vocabulary size is not known, so that its ids cannot be checked."""
        return None in self._sizes.values()

    def _check_vocabulary(self, item: ScoreInput) -> Item:
        """Return the row, or the reason why its teacher cannot score it."""
        size, largest_id = self._sizes[item.teacher_id], int(item.ids.max(initial=0))
        if size is None or largest_id < size:
            return item
        return BadRow(item.number, DataError(
            "a row has an id outside the teacher's vocabulary", where=f"{self.config.data}:{item.number}",
            got=largest_id, expected=f"below {size}",
        ))  # fmt: skip

    def _refuse_teacher(self, item: ScoreInput) -> BadRow:
        routes, name = self.config.routes, item.teacher_id
        if not name:
            hint = "name the row's teacher_id"
        elif routes:
            hint = "give its server with --teacher-id NAME=URL"
        else:
            hint = f"add --teacher-id {name} to score its rows, or give --teacher-id NAME=URL for each teacher"
        return BadRow(item.number, DataError(
            "a row is for another teacher", where=f"{self.config.data}:{item.number}",
            got=repr(name) if name else "none",
            expected="one of " + ", ".join(map(repr, routes)) if routes else "a row that names no teacher", hint=hint,
        ))  # fmt: skip


def _read_vocab_size(address: TeacherAddress) -> int | None:
    """Return a teacher's vocabulary size: the configured one, or that of a model that is loaded in this process."""
    if address.vocab_size is not None or not address.urls[0].startswith(IN_PROCESS):
        return address.vocab_size
    try:
        config = json.loads(
            (Path(address.urls[0].removeprefix(IN_PROCESS)) / "config.json").read_text(encoding="utf-8")
        )
        size = config.get("text_config", config).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # loading the model reports what is wrong
    return size if isinstance(size, int) and size > 0 else None


def digest_sequence(item: ScoreInput) -> bytes:
    """Digest a sequence, its start and its teacher to 16 bytes."""
    start = item.start.to_bytes(8, "little")
    teacher = hashlib.blake2b(item.teacher_id.encode()).digest() if item.teacher_id else b""
    return hashlib.blake2b(item.ids.tobytes(), digest_size=16, salt=start, key=teacher).digest()


class TeacherQueue:
    """One teacher of a job, behind the cache.

    Args:
        teacher: A teacher that is connected and checked.
        store: A store that is open for appending.
        identity: The teacher's identity in the cache.
    """

    def __init__(self, teacher: OpenTeacher, store: ScoreStore, identity: TeacherIdentity) -> None:
        self.teacher, self.identity, self.live = teacher, identity, _CountingScorer(teacher.scorer)
        self.scorer = CachingScorer(self.live, store, identity)


class ScoreJob(BulkJob[tuple[Item, bool], ScoreInput, TopK]):
    """Scores the selected rows.

    Args:
        config: Config of the job.
        report: The report to fill in.
        progress: Shows the counts.
        store: A store that is open for appending.
        queues: The teachers, by the teacher_id of their rows.
        budget: Decides which rows may be requested, by the caps and by the claims of other workers.
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
        """Read the next rows; add to each whether the cache has its scores."""
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
        """Return the number of rows that are done, and of tokens that were sent."""
        report = self.report
        done = report.cached + report.refused + report.failed + report.duplicates + report.skipped + self.replies
        return done, sum(queue.live.tokens for queue in self.queues.values())

    def complete_report(self) -> None:
        """Fill in the totals from the counters."""
        report, scorers = self.report, [queue.live for queue in self.queues.values()]
        report.scored = sum(scorer.replies for scorer in scorers)
        report.tokens_sent = sum(scorer.tokens for scorer in scorers)
        report.cached += self.replies - report.scored
        caches = [queue.scorer.metrics for queue in self.queues.values()]
        report.saved_tokens += sum(metrics.saved_tokens + metrics.hits + metrics.joined for metrics in caches)

    def _queue(self, item: ScoreInput) -> TeacherQueue:
        return self.queues[item.teacher_id]

    def _is_cached(self, item: Item) -> bool:
        """Whether the cache has the row's scores. They are read, so that a damaged record is requested again."""
        if isinstance(item, BadRow):
            return False
        return self.store.covers(self._queue(item).identity, item.ids, item.start, self.config.k, read=True)

    def _needs_request(self, item: Item, *, is_cached: bool) -> bool:
        """Return whether a row must be requested; count any other row here."""
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
        """Count a row for which another worker requests and stores an equal one."""
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
    """Counts the replies of a teacher, and the tokens sent to it."""

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
    """Put the cache in front of each open teacher; return them by teacher_id."""
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
