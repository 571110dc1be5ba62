"""The model thread: waiting jobs, batches, generation steps, pauses and cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch

from topkd.serve.config import ServeConfig
from topkd.serve.engine.jobs import Answer, EngineJob
from topkd.serve.engine.refusal import Refusal, check_sequences, generation_paused, overloaded
from topkd.serve.engine.scoring import score_prompts
from topkd.serve.engine.sequences import GeneratedSequence, SequenceGroup, draw_next
from topkd.serve.engine.texts import Endings
from topkd.serve.model.backbone import Backbone, pad_right

T = TypeVar("T")
PauseMode = Literal["abort", "wait", "keep"]
# Jobs looked at together when a batch is formed; similar lengths of them share a forward pass.
WINDOW = 64


@dataclass(slots=True, eq=False)
class PendingJob:
    """A job in progress. Cancelling it stops its work at the next step."""

    job: EngineJob
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Answer]
    cancelled: bool = False
    sequences: list[GeneratedSequence] = field(default_factory=list)
    answer: Answer = field(default_factory=lambda: Answer([]))
    begun: bool = False
    on_step: Callable[[], None] | None = None  # called in the loop after a step, once ``drawn`` is of that step
    drawn: list[tuple[int, bool]] = field(default_factory=list)  # tokens of each sequence, and whether it has ended

    def cancel(self) -> None:
        """Stop its work at the next step; nobody waits for it."""
        self.cancelled = True
        self.future.cancel()

    @property
    def open(self) -> bool:
        """Whether anything is still to be drawn."""
        return any(not sequence.done for sequence in self.sequences)


def resolve_future(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], value: T | None = None, error: Exception | None = None
) -> None:
    """Set a future from another thread, unless its loop is closed or it is done."""

    def act() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]

    call_in_loop(loop, act)


def call_in_loop(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    """Call a function in a loop from another thread, unless the loop is closed."""
    try:
        loop.call_soon_threadsafe(act)
    except RuntimeError:
        if not loop.is_closed():
            raise


class Engine:
    """Runs jobs in order of arrival, many at a time. Safe to call from any event loop.

    Attributes:
        backbone: The model; only the thread may use it.
        version: Name of the weights now being served.
    """

    def __init__(self, backbone: Backbone, endings: Endings, config: ServeConfig, context: int) -> None:
        self.backbone, self.version = backbone, "default"
        self._endings, self._config, self._context = endings, config, context
        self._waiting: deque[PendingJob] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._running: list[PendingJob] = []
        self._groups: list[SequenceGroup] = []
        self._stale: list[GeneratedSequence] = []  # sequences whose cache belongs to replaced weights
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._mode: PauseMode | None = None
        self._seeds = torch.Generator().manual_seed(config.seed)
        self._processed = config.logprobs_mode == "processed_logprobs"
        self.prompt_tokens = self.drawn_tokens = 0

    async def submit(self, jobs: list[EngineJob]) -> list[Answer]:
        """Run jobs and return their answers in order; cancelling the caller cancels them.

        Raises:
            Refusal: As ``start``, or the model failed on a job (500).
        """
        pending_jobs = self.start(jobs)
        try:
            return list(await asyncio.gather(*(pending.future for pending in pending_jobs)))
        finally:
            for pending in pending_jobs:
                pending.cancelled = True

    def start(self, jobs: list[EngineJob], on_step: Callable[[], None] | None = None) -> list[PendingJob]:
        """Queue jobs; their futures are of the running loop. Whoever leaves them must cancel them.

        Raises:
            Refusal: A job is too large (400), or the queue is full or the server paused (503).
        """
        for job in jobs:
            check_sequences(job, self._context, self._config.max_kv_tokens)
        loop = asyncio.get_running_loop()
        pending_jobs = [PendingJob(job, loop, loop.create_future(), on_step=on_step) for job in jobs]
        with self._wake:
            if self._mode is not None and self._config.when_paused == "refuse":
                raise generation_paused()
            if len(self._waiting) >= self._config.max_queue:
                self._waiting = deque(pending for pending in self._waiting if not pending.cancelled)
            if len(self._waiting) >= self._config.max_queue:
                raise overloaded(len(self._waiting), self._config.max_queue)
            self._start()
            self._waiting.extend(pending_jobs)
            self._wake.notify()
        return pending_jobs

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the model thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                value = work()
            except Exception as error:  # noqa: BLE001 - handed to the caller
                resolve_future(loop, future, error=error)
            else:
                resolve_future(loop, future, value)

        with self._wake:
            self._start()
            self._calls.append(run)
            self._wake.notify()
        return await future

    async def pause(self, mode: PauseMode) -> None:
        """Stop starting work; ``wait`` returns when running work is done, ``abort`` ends it, ``keep`` freezes it."""
        with self._wake:
            self._mode = mode
            self._wake.notify()
        if mode == "abort":
            await self.call(self._abort_running)
        while mode == "wait" and self._mode == "wait" and self._running:  # noqa: ASYNC110 - the thread has no loop to wake
            await asyncio.sleep(0.005)
        await self.call(lambda: None)  # the step that was under way is over

    def resume(self) -> None:
        """Resume after a pause."""
        with self._wake:
            self._mode = None
            self._wake.notify()

    @property
    def paused(self) -> bool:
        """Whether new work is held back."""
        return self._mode is not None

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting) jobs."""
        return len(self._running), len(self._waiting)

    def weights_changed(self) -> None:
        """Mark caches of the old weights for a rebuild before the next token (call in the model thread)."""
        for group in self._groups:
            self._stale += group.sequences
        self._groups.clear()

    def drop_adapter(self, name: str) -> None:
        """Abort work that runs on or waits for an adapter (call in the model thread)."""
        for pending in self._running:
            if pending.job.adapter == name:
                for sequence in pending.sequences:
                    self._endings.abort(sequence)
        for group in self._groups:
            group.drop_done()
        self._groups = [group for group in self._groups if group.sequences]
        with self._wake:
            gone = [pending for pending in self._waiting if pending.job.adapter == name]
            self._waiting = deque(pending for pending in self._waiting if pending.job.adapter != name)
        for pending in gone:
            self._abort_unbegun(pending)
        self._settle_finished()

    def stop(self) -> None:
        """End the thread; what was running or waiting is answered as aborted. It starts again with the next job."""
        with self._wake:
            thread, self._thread = self._thread, None
            self._stopping = True
            self._wake.notify()
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="topkd-serve-model", daemon=True)
            self._thread.start()

    def _idle(self) -> bool:
        if self._stopping or self._calls:
            return False
        if self._mode == "keep":
            return True
        return not (self._groups or self._stale) and (self._mode is not None or not self._waiting)

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._idle():
                    self._wake.wait()
                if self._stopping:
                    break
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for work in calls:
                work()
            if self._mode != "keep":
                with torch.inference_mode():
                    self._run_step()
        self._abort_running()
        while self._waiting:
            self._abort_unbegun(self._waiting.popleft())

    def _run_step(self) -> None:
        """Prefill what fits, then draw one token for every running sequence."""
        for batch in self._next_batches() if self._mode is None else []:
            try:
                self._prefill(batch)
            except Exception as error:  # noqa: BLE001 - a model that fails must not end the thread
                self._fail(error, batch)
        try:
            if self._stale:
                self._rebuild()
            for group in self._groups:
                self._forget_cancelled(group)
            self._groups = [group for group in self._groups if group.sequences]
            for group in self._groups:
                self.backbone.use_adapter(group.adapter)
                group.step(processed=self._processed, version=self.version)
                self._close_finished(group)
            self._groups = [group for group in self._groups if group.sequences]
        except Exception as error:  # noqa: BLE001 - as above
            self._groups.clear()
            self._stale.clear()
            self._fail(error, list(self._running))
        self._settle_finished()
        for pending in self._running:
            if pending.on_step is not None:
                pending.drawn = [(len(sequence.out.token_ids), sequence.done) for sequence in pending.sequences]
                call_in_loop(pending.loop, pending.on_step)

    def _next_batches(self) -> list[list[PendingJob]]:
        """Take waiting jobs of one adapter that fit, and split them into batches of similar length."""
        chosen: list[PendingJob] = []
        with self._wake:
            running = sum(len(group.sequences) for group in self._groups)
            longest = max((group.width for group in self._groups), default=0)
            while self._waiting and len(chosen) < WINDOW:
                pending = self._waiting[0]
                if pending.cancelled:
                    self._waiting.popleft()
                    continue
                if chosen and pending.job.adapter != chosen[0].job.adapter:
                    break
                if pending.job.sampling.max_tokens > 1:
                    running += pending.job.n
                    longest = max(longest, len(pending.job.ids) + pending.job.sampling.max_tokens)
                    full = running > self._config.max_running or running * longest > self._config.max_kv_tokens
                    if full and (chosen or self._groups):
                        break
                chosen.append(self._waiting.popleft())
        batches: list[list[PendingJob]] = []
        for pending in sorted(chosen, key=lambda t: (t.job.sampling.max_tokens > 1, len(t.job.ids))):
            if batches and self._may_join(pending, batches[-1]):
                batches[-1].append(pending)
            else:
                batches.append([pending])
        self._running += chosen
        return batches

    def _may_join(self, pending: PendingJob, batch: list[PendingJob]) -> bool:
        length, first = len(pending.job.ids), len(batch[0].job.ids)
        generates = pending.job.sampling.max_tokens > 1
        if generates != (batch[0].job.sampling.max_tokens > 1):
            return False
        if generates and not self.backbone.mixes_lengths and length != first:
            return False
        # Sorted by length: everything is padded to this one. Beyond twice the shortest, padding costs more than a pass.
        return length * (len(batch) + 1) <= self._config.max_batch_tokens and length <= 2 * first + 16

    def _start_sequences(self, pending: PendingJob) -> None:
        job, pending.begun = pending.job, True
        limit = min(job.sampling.max_tokens, self._context - len(job.ids))
        stops = job.sampling.stop_token_ids | (frozenset() if job.sampling.ignore_eos else self._endings.eos)
        for index in range(job.n):
            seed = job.sampling.seed
            drawn = int(torch.randint(2**62, (), generator=self._seeds)) if seed is None else seed + index
            generator = np.random.default_rng(drawn & (2**63 - 1))
            pending.sequences.append(GeneratedSequence(job, index, limit, stops, generator))

    def _prefill(self, batch: list[PendingJob]) -> None:
        batch = [pending for pending in batch if not pending.cancelled]
        if not batch:
            return
        jobs = [pending.job for pending in batch]
        adapter = jobs[0].adapter
        self.backbone.use_adapter(adapter)
        generates = jobs[0].sampling.max_tokens > 1
        cache = self.backbone.new_cache() if generates else None
        hidden = self.backbone.hidden(pad_right([job.ids for job in jobs], self.backbone.device), cache=cache)
        for pending, (scores, candidate_logp) in zip(batch, score_prompts(self.backbone, jobs, hidden), strict=True):
            pending.answer.scores, pending.answer.candidate_logp = scores, candidate_logp
            self._start_sequences(pending)
        last = torch.stack([hidden[row, len(job.ids) - 1] for row, job in enumerate(jobs)])
        del hidden
        rows = [row for row, pending in enumerate(batch) for _ in pending.sequences]
        sequences = [sequence for pending in batch for sequence in pending.sequences]
        self.prompt_tokens += sum(len(job.ids) for job in jobs)
        for part in self.backbone.chunks(len(sequences)):
            logits = self.backbone.logits(last[rows[part]])
            draw_next(sequences[part], logits, processed=self._processed, version=self.version)
        if generates:
            group = SequenceGroup.after_prefill(self.backbone, adapter, sequences, cache, rows)
            self._close_finished(group)
            if group.sequences:
                self._join(group)
        else:
            self._endings.apply(sequences)
            self.drawn_tokens += len(sequences)
        self._settle_finished()

    def _rebuild(self) -> None:
        """Run the tokens so far through the present weights to rebuild the caches."""
        stale, self._stale = [sequence for sequence in self._stale if not sequence.done], []
        for sequence in stale:
            self.backbone.use_adapter(sequence.job.adapter)
            cache = self.backbone.new_cache()
            ids = pad_right([sequence.tokens[:-1]], self.backbone.device)
            self.backbone.hidden(ids, cache=cache)
            self._join(SequenceGroup(self.backbone, sequence.job.adapter, [sequence], cache))

    def _join(self, group: SequenceGroup) -> None:
        for other in self._groups:
            if other.adapter == group.adapter and self.backbone.mixes_lengths:
                other.absorb(group)
                return
        self._groups.append(group)

    def _close_finished(self, group: SequenceGroup) -> None:
        self.drawn_tokens += len(group.sequences)
        self._endings.apply(group.sequences)
        group.drop_done()

    def _forget_cancelled(self, group: SequenceGroup) -> None:
        dead = {id(sequence) for pending in self._running if pending.cancelled for sequence in pending.sequences}
        for sequence in group.sequences:
            sequence.done = sequence.done or id(sequence) in dead
        group.drop_done()

    def _abort_running(self) -> None:
        self._groups.clear()
        self._stale.clear()
        for sequence in (sequence for pending in self._running for sequence in pending.sequences):
            self._endings.abort(sequence)
        self._settle_finished()

    def _settle_finished(self) -> None:
        for pending in [t for t in self._running if t.begun and not t.open]:
            self._running.remove(pending)
            self._end(pending)
        self._running = [pending for pending in self._running if not (pending.cancelled and not pending.begun)]

    def _abort_unbegun(self, pending: PendingJob) -> None:
        self._start_sequences(pending)
        self._end(pending)

    def _end(self, pending: PendingJob) -> None:
        pending.answer.completions = [self._endings.finish(sequence) for sequence in pending.sequences]
        resolve_future(pending.loop, pending.future, pending.answer)

    def _fail(self, error: Exception, batch: list[PendingJob]) -> None:
        """Answer the jobs of a failed pass with 500."""
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        refusal = Refusal(f"The model failed: {message}", status=500, kind="InternalServerError")
        for pending in batch:
            if pending in self._running:
                self._running.remove(pending)
            resolve_future(pending.loop, pending.future, error=refusal)
