"""The engine room of ``score_data``: reads ahead a little, asks a bounded number at once, writes down every row."""

from __future__ import annotations

import asyncio
import hashlib
import time
from itertools import islice

from topkd.compose.progress import Progress
from topkd.compose.score_config import ScoreConfig, ScoreReport
from topkd.compose.selection import Budget, Selection
from topkd.compose.sequences import BadRow, ScoreInput
from topkd.compose.teachers import OpenTeacher
from topkd.offline import CachingScorer, ScoreStore, TeacherIdentity
from topkd.topk.errors import (
    AuthError,
    DataError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    RetryableServerError,
    TopkdError,
)
from topkd.topk.protocols import Ids, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK

GIVE_UP_AFTER = 32  # rows in a row that the server does not answer
_CHUNK = 64
_COMMIT_EVERY_S = 1.0
# Trouble with this very row; trouble that every row would have ends the job.
_ROW_TROUBLE = (RequestRefusedError, ResponseError, RetryableServerError)
_JOB_TROUBLE = (KLimitError, ModelNotFoundError, AuthError)


class BulkJob:
    """Reads ahead a little, keeps a bounded number of requests in flight, and writes down what became of each row."""

    def __init__(
        self,
        config: ScoreConfig,
        *,
        report: ScoreReport,
        progress: Progress,
        store: ScoreStore,
        identity: TeacherIdentity,
        teacher: OpenTeacher,
    ) -> None:
        self.config, self.report, self.progress, self.store, self.identity = config, report, progress, store, identity
        self.teacher, self.live = teacher, _Counting(teacher.scorer)
        self.scorer = CachingScorer(self.live, store, identity)
        self.budget = Budget(config)
        self.queue: asyncio.Queue[ScoreInput | None] = asyncio.Queue(2 * config.in_flight)
        self.answered = self.busy = self.in_a_row = self.total = 0
        self.began = time.monotonic()

    async def run(self, selection: Selection) -> None:
        """To the end of the data, or to a cap."""
        self.total = await asyncio.to_thread(selection.forecast)
        self.progress.stage("score", self.total)
        try:
            async with asyncio.TaskGroup() as group:
                committing = group.create_task(self._commit())
                workers = [group.create_task(self._work()) for _ in range(self.config.in_flight)]
                await self._feed(selection)
                for _ in workers:
                    await self.queue.put(None)
                await asyncio.wait(workers)
                committing.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    async def _feed(self, selection: Selection) -> None:
        items, report = iter(selection), self.report
        asked = False
        while chunk := await asyncio.to_thread(lambda: list(islice(items, _CHUNK))):
            report.duplicates = selection.duplicates
            for item in chunk:
                size = int(item.ids.size) if isinstance(item, ScoreInput) else 0
                if isinstance(item, BadRow):
                    self._refuse(item)
                elif self.teacher.context is not None and size + 1 > self.teacher.context:
                    self._refuse(BadRow(item.number, DataError(
                        "a row is longer than the server's context", where=f"{self.config.data}:{item.number}",
                        got=f"{size} tokens and one to generate", expected=f"at most {self.teacher.context}",
                    )))  # fmt: skip
                elif self.store.covers(self.identity, item.ids, item.start, self.config.k):
                    report.saved_tokens += size
                    report.positions += size - 1 - item.start
                    report.cached += 1
                    self._keep_rollout(item)
                elif self.budget.take((size + 1) * (1 if asked else self.teacher.first_cost)):
                    if not asked:
                        await self.teacher.agree(item.ids, item.start, self.config.k)
                    asked = True
                    await self.queue.put(item)
                else:
                    report.stopped = self.budget.reached
                    return
                report.rows += 1
            self._show()

    async def _work(self) -> None:
        while (item := await self.queue.get()) is not None:
            self.busy += 1
            try:
                rows = await self.scorer.score(item.ids, item.start, self.config.k)
            except _JOB_TROUBLE:
                raise
            except _ROW_TROUBLE as error:
                self._failed(item, error)
            else:
                self.in_a_row = 0
                self.answered += 1
                self.report.positions += rows.rows
                self._keep_rollout(item)
            finally:
                self.busy -= 1
            self._show()

    async def _commit(self) -> None:
        while True:  # so that kill -9 loses a second's work, not a group's
            await asyncio.sleep(_COMMIT_EVERY_S)
            await asyncio.to_thread(self.store.commit)

    def _keep_rollout(self, item: ScoreInput) -> None:
        """Sampled logprobs of a row go beside its scores, so that a replay can train on it off-policy."""
        if item.logp is None:
            return
        prompt, completion = item.ids[: item.start + 1], item.ids[item.start + 1 :]
        # The request that a rollout answers is named by its seed; given rollouts are told apart by what they hold.
        seed = int.from_bytes(hashlib.blake2b(completion.tobytes(), digest_size=4).digest(), "big") >> 1
        params = SamplingParams(max_tokens=int(completion.size), seed=seed)
        given = TeacherIdentity("data", revision=self.config.data.stem)
        rollout = Rollout(prompt, completion, item.logp, item.finish_reason, params, version="0")
        self.store.put_rollouts(given, prompt, [rollout], params)

    def _refuse(self, row: BadRow) -> None:
        if self.config.strict:
            raise row.reason
        self.report.refused += 1
        self.report.blame(row.number, row.reason)

    def _failed(self, item: ScoreInput, error: TopkdError) -> None:
        self.in_a_row += 1
        if self.in_a_row >= GIVE_UP_AFTER:
            raise error
        if isinstance(error, RequestRefusedError):
            if self.config.strict:
                raise error
            self.report.refused += 1
        else:
            self.report.failed += 1
        self.report.blame(item.number, error)

    def account(self) -> None:
        """The totals that follow from the counters."""
        report, live = self.report, self.live
        report.scored, report.tokens_sent = live.answered, live.tokens
        report.cached += self.answered - live.answered
        report.saved_tokens += self.scorer.metrics.saved_tokens
        if self.config.price_per_million is not None:
            report.cost = live.tokens * self.config.price_per_million / 1e6

    def _show(self) -> None:
        report, seconds = self.report, max(time.monotonic() - self.began, 1e-9)
        done = report.cached + report.refused + report.failed + report.duplicates + self.answered
        detail = f"{self.live.tokens / seconds:.0f} tok/s  {self.busy} in flight"
        for count, name in ((report.cached, "cached"), (report.refused, "refused"), (report.failed, "failed")):
            detail += f"  {count} {name}" if count else ""
        left = self.total - done
        if left > 0 and self.answered:
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


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
