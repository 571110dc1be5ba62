"""The engine room of ``score``: reads ahead a little, asks a bounded number at once, writes down every row."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeGuard

from topkd.compose.bulk.report import JOB_TROUBLE, ROW_TROUBLE, Troubles, committing
from topkd.compose.bulk.score_config import ScoreConfig, ScoreReport, TeacherAddress
from topkd.compose.bulk.selection import Claim, Selection, digest_of
from topkd.compose.cache.identity import GIVEN, build_served_identity
from topkd.compose.data.sequences import BadRow, Item, ScoreInput
from topkd.compose.progress import Progress
from topkd.compose.teachers.served import OpenTeacher, open_teacher
from topkd.engine.loop.waiting import root_exception
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.offline import CachingScorer, ScoreStore, TeacherIdentity
from topkd.topk.errors import DataError
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK

_CHUNK = 64


class RequestBudget(Protocol):
    """Who may ask for what."""

    reached: str  # the cap that a Verdict.CAP is about

    async def claim(self, wanted: Sequence[tuple[bytes, int]]) -> list[Claim]:
        """A verdict for each row, by its digest and the tokens it would send."""
        ...


class TeacherQueue:
    """One teacher of a job, with the cache before it.

    Args:
        teacher: Met and ready.
        store: Open for appending.
        identity: What its scores are filed under.
    """

    def __init__(self, teacher: OpenTeacher, store: ScoreStore, identity: TeacherIdentity) -> None:
        self.teacher, self.identity, self.live = teacher, identity, _Counting(teacher.scorer)
        self.scorer = CachingScorer(self.live, store, identity)
        self.asked = False

    def cost_tokens(self, tokens: int) -> int:
        """Tokens that asking for a sequence sends, with the one that is generated."""
        return (tokens + 1) * (1 if self.asked else self.teacher.first_cost)

    async def meet(self, item: ScoreInput, k: int) -> None:
        """Compare the replicas on the first sequence that is asked at all."""
        if not self.asked:
            self.asked = True
            await self.teacher.agree(item.ids, item.start, k)


@dataclass(slots=True)
class CountAnswers:
    """Counted while the job runs."""

    rows: int = 0
    busy: int = 0


class BulkJob:
    """Reads ahead a little, keeps a bounded number of requests in flight, and writes down what became of each row.

    Args:
        config: What was asked.
        report: Filled in.
        progress: Told what goes on.
        store: Open for appending.
        lanes: The teachers, by the teacher_id of their rows.
        permits: Says which rows may be asked: the caps, and what other workers have taken on.
    """

    def __init__(
        self,
        config: ScoreConfig,
        *,
        report: ScoreReport,
        progress: Progress,
        store: ScoreStore,
        lanes: Mapping[str, TeacherQueue],
        permits: RequestBudget,
    ) -> None:
        self.config, self.report, self.progress, self.store = config, report, progress, store
        self.lanes, self.permits = lanes, permits
        self.queue: asyncio.Queue[ScoreInput | None] = asyncio.Queue(2 * config.in_flight)
        self.answered, self.total = CountAnswers(), 0
        self.troubles = Troubles(report, strict=config.strict)
        self.began = time.monotonic()

    async def run(self, selection: Selection) -> None:
        """To the end of the data, or to a cap."""
        self.total = await asyncio.to_thread(selection.forecast)
        self.progress.stage("score", self.total)
        try:
            async with asyncio.TaskGroup() as group:
                saving = group.create_task(committing(self.store))
                workers = [group.create_task(self._work()) for _ in range(self.config.in_flight)]
                await self._feed(selection)
                for _ in workers:
                    await self.queue.put(None)
                await asyncio.wait(workers)
                saving.cancel()
        except BaseExceptionGroup as errors:
            raise root_exception(errors) from errors

    async def _feed(self, selection: Selection) -> None:
        items, report = iter(selection), self.report
        while chunk := await asyncio.to_thread(lambda: [(item, self._held(item)) for item in islice(items, _CHUNK)]):
            report.duplicates, report.skipped = selection.duplicates, selection.skipped
            wanted = [item for item, held in chunk if self._is_new(item, held=held)]
            priced = [(digest_of(item), self._lane(item).cost_tokens(int(item.ids.size))) for item in wanted]
            verdicts = await self.permits.claim(priced) if wanted else []
            for item, verdict in zip(wanted, verdicts, strict=True):
                if verdict is Claim.CAP:
                    report.stopped = self.permits.reached
                    return
                report.rows += 1
                if verdict is Claim.ELSEWHERE:
                    self._elsewhere(item)
                    continue
                await self._lane(item).meet(item, self.config.k)
                await self.queue.put(item)
            self._show()

    def _lane(self, item: ScoreInput) -> TeacherQueue:
        return self.lanes[item.teacher_id]

    def _held(self, item: Item) -> bool:
        """Whether the cache has the row's scores; they are read, so that a damaged record is asked for again."""
        if isinstance(item, BadRow):
            return False
        return self.store.covers(self._lane(item).identity, item.ids, item.start, self.config.k, read=True)

    def _is_new(self, item: Item, *, held: bool) -> TypeGuard[ScoreInput]:
        """True when a row must be asked for; what becomes of any other is written down here."""
        report = self.report
        if isinstance(item, BadRow):
            self.troubles.refuse(item.number, item.reason)
        else:
            lane, size = self._lane(item), int(item.ids.size)
            context = lane.teacher.context
            if context is not None and size + 1 > context:
                self.troubles.refuse(item.number, DataError(
                    "a row is longer than the server's context", where=f"{self.config.data}:{item.number}",
                    got=f"{size} tokens and one to generate", expected=f"at most {context}",
                ))  # fmt: skip
            elif held:
                report.cached += 1
                report.saved_tokens += size + 1
                report.positions += size - 1 - item.start
                self._keep_rollout(item)
            else:
                return True
        report.rows += 1
        return False

    def _elsewhere(self, item: ScoreInput) -> None:
        """An equal row is another worker's: it asks, and keeps what is to be kept."""
        if self.config.dedupe:
            self.report.duplicates += 1
            self.report.rows -= 1
            return
        self.report.cached += 1
        self.report.saved_tokens += int(item.ids.size) + 1
        self.report.positions += int(item.ids.size) - 1 - item.start

    async def _work(self) -> None:
        while (item := await self.queue.get()) is not None:
            self.answered.busy += 1
            try:
                rows = await self._lane(item).scorer.score(item.ids, item.start, self.config.k)
            except JOB_TROUBLE:
                raise
            except ROW_TROUBLE as error:
                self.troubles.failed(item.number, error)
            else:
                self.troubles.answered()
                self.answered.rows += 1
                self.report.positions += rows.rows
                self._keep_rollout(item)
            finally:
                self.answered.busy -= 1
            self._show()

    def _keep_rollout(self, item: ScoreInput) -> None:
        """Sampled logprobs of a row go beside its scores, so that a replay can train on it off-policy."""
        if item.logp is None or item.prompt_ids is None:
            return
        prompt, completion = item.prompt_ids, item.ids[item.start + 1 :]
        # The request that a rollout answers is named by its seed; given rollouts are told apart by what they hold.
        seed = int.from_bytes(hashlib.blake2b(completion.tobytes(), digest_size=4).digest(), "big") >> 1
        params = SamplingParams(max_tokens=int(completion.size), seed=seed)
        given_identity = TeacherIdentity(GIVEN, revision=self.config.data.stem)
        rollout = Rollout(prompt, completion, item.logp, item.finish_reason, params, version="0")
        self.store.put_rollouts(given_identity, prompt, [rollout], params)

    def account(self) -> None:
        """The totals that follow from the counters."""
        report, lives = self.report, [lane.live for lane in self.lanes.values()]
        report.scored, report.tokens_sent = sum(live.answered for live in lives), sum(live.tokens for live in lives)
        report.cached += self.answered.rows - report.scored
        spared = [lane.scorer.metrics for lane in self.lanes.values()]
        report.saved_tokens += sum(counter.saved_tokens + counter.hits + counter.joined for counter in spared)

    def _show(self) -> None:
        report, answered, seconds = self.report, self.answered, max(time.monotonic() - self.began, 1e-9)
        done = report.cached + report.refused + report.failed + report.duplicates + report.skipped + answered.rows
        tokens = sum(lane.live.tokens for lane in self.lanes.values())
        detail = f"{tokens / seconds:.0f} tok/s  {answered.busy} in flight{report.setbacks()}"
        left = self.total - done
        if left > 0 and answered.rows:
            detail += f"  ETA {left * seconds / done:.0f} s"
        self.progress.advance(done, detail)


class _Counting:
    """A teacher whose answers are counted."""

    def __init__(self, scorer: TeacherScorer) -> None:
        self._scorer = scorer
        self.answered = self.tokens = 0

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """As ``TeacherScorer.score``."""
        rows = await self._scorer.score(ids, start, k)
        self.answered += 1
        self.tokens += len(ids) + 1
        return rows


def build_queues(
    config: ScoreConfig, teachers: Mapping[str, OpenTeacher], store: ScoreStore
) -> dict[str, TeacherQueue]:
    """Each open teacher with the cache before it, by the teacher_id of its rows."""
    revisions = {name: asked.revision for name, asked in config.asked().items()}
    return {name: TeacherQueue(teacher, store, build_served_identity(store, teacher.name, revisions[name]))
            for name, teacher in teachers.items()}  # fmt: skip


def sum_counters(counters: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Counters of several clients as one's."""
    total: dict[str, float] = {}
    for counter in counters:
        for name, number in counter.items():
            total[name] = total.get(name, 0.0) + number
    return total


def open_job_teacher(config: ScoreConfig, asked: TeacherAddress) -> AbstractAsyncContextManager[OpenTeacher]:
    """One of the job's teachers, met when the context is entered."""
    return open_teacher(
        asked.urls,
        dialect=config.dialect,
        model=asked.model,
        api_key=config.api_key,
        config=config.client,
        vocab_size=asked.vocab_size,
        k=config.k,
        engine=config.engine,
    )


def load_text_tokenizer(path: str | None) -> Any:
    """The tokenizer for rows of text, None when none is named."""
    return None if path is None else load_tokenizer(path)
