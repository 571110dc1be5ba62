"""The one thread that touches the model: waiting jobs, batches, generation steps, pauses and cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from topkd.serve.config import ServeConfig
from topkd.serve.engine.endings import Endings
from topkd.serve.engine.jobs import Answer, EngineJob
from topkd.serve.engine.pending import Ticket, settle
from topkd.serve.engine.refusal import Refusal, check_sequences, overloaded
from topkd.serve.engine.scoring import score_prompts
from topkd.serve.engine.sequences import GeneratedSequence, SequenceGroup, draw_next
from topkd.serve.model.backbone import Backbone, pad_right

T = TypeVar("T")
PauseMode = Literal["abort", "wait", "keep"]
# Jobs looked at together when a batch is formed; similar lengths of them share a forward pass.
WINDOW = 64


class Engine:
    """Runs jobs in the order they came, many at a time. Safe to call from any event loop.

    Attributes:
        backbone: The model; only the thread may use it.
        version: Name of the weights now being served.
    """

    def __init__(self, backbone: Backbone, endings: Endings, config: ServeConfig, context: int) -> None:
        self.backbone, self.version = backbone, "default"
        self._endings, self._config, self._context = endings, config, context
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._running: list[Ticket] = []
        self._groups: list[SequenceGroup] = []
        self._stale: list[GeneratedSequence] = []  # drafts whose cache belongs to replaced weights
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._mode: PauseMode | None = None
        self._seeds = torch.Generator().manual_seed(config.seed)
        self.prompt_tokens = self.drawn_tokens = 0

    async def submit(self, jobs: list[EngineJob]) -> list[Answer]:
        """Every job's answer, in order. Cancelling the caller cancels the work.

        Raises:
            Refusal: A job is too large (400), the queue is full (503), or the model failed on a job (500).
        """
        for job in jobs:
            check_sequences(job, self._context, self._config.max_kv_tokens)
        loop = asyncio.get_running_loop()
        tickets = [Ticket(job, loop, loop.create_future()) for job in jobs]
        with self._wake:
            if len(self._waiting) >= self._config.max_queue:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            if len(self._waiting) >= self._config.max_queue:
                raise overloaded(len(self._waiting), self._config.max_queue)
            self._start()
            self._waiting.extend(tickets)
            self._wake.notify()
        try:
            return list(await asyncio.gather(*(ticket.future for ticket in tickets)))
        finally:
            for ticket in tickets:
                ticket.cancelled = True

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the model thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                value = work()
            except Exception as error:  # noqa: BLE001 - handed to the caller
                settle(loop, future, error=error)
            else:
                settle(loop, future, value)

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
        """Go on."""
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
        """In the model thread: caches of the old weights are dropped and built again before the next token."""
        for group in self._groups:
            self._stale += group.sequences
        self._groups.clear()

    def drop_adapter(self, name: str) -> None:
        """In the model thread: abort whatever runs on, or waits for, an adapter that is about to go."""
        for ticket in self._running:
            if ticket.job.adapter == name:
                for draft in ticket.drafts:
                    self._endings.abort(draft)
        for group in self._groups:
            group.drop_done()
        self._groups = [group for group in self._groups if group.sequences]
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.job.adapter == name]
            self._waiting = deque(ticket for ticket in self._waiting if ticket.job.adapter != name)
        for ticket in gone:
            self._end_unbegun(ticket)
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
                    self._turn()
        self._abort_running()
        while self._waiting:
            self._end_unbegun(self._waiting.popleft())

    def _turn(self) -> None:
        """Prefill what fits, then one token for everything that generates."""
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
                self._close(group)
            self._groups = [group for group in self._groups if group.sequences]
        except Exception as error:  # noqa: BLE001 - as above
            self._groups.clear()
            self._stale.clear()
            self._fail(error, list(self._running))
        self._settle_finished()

    @property
    def _processed(self) -> bool:
        return self._config.logprobs_mode == "processed_logprobs"

    def _next_batches(self) -> list[list[Ticket]]:
        """Jobs of one adapter that fit, split into batches of similar length."""
        chosen: list[Ticket] = []
        with self._wake:
            running = sum(len(group.sequences) for group in self._groups)
            longest = max((group.width for group in self._groups), default=0)
            while self._waiting and len(chosen) < WINDOW:
                ticket = self._waiting[0]
                if ticket.cancelled:
                    self._waiting.popleft()
                    continue
                if chosen and ticket.job.adapter != chosen[0].job.adapter:
                    break
                if ticket.job.sampling.max_tokens > 1:
                    running += ticket.job.n
                    longest = max(longest, len(ticket.job.ids) + ticket.job.sampling.max_tokens)
                    full = running > self._config.max_running or running * longest > self._config.max_kv_tokens
                    if full and (chosen or self._groups):
                        break
                chosen.append(self._waiting.popleft())
        batches: list[list[Ticket]] = []
        for ticket in sorted(chosen, key=lambda t: (t.job.sampling.max_tokens > 1, len(t.job.ids))):
            if batches and self._may_join(ticket, batches[-1]):
                batches[-1].append(ticket)
            else:
                batches.append([ticket])
        self._running += chosen
        return batches

    def _may_join(self, ticket: Ticket, batch: list[Ticket]) -> bool:
        length, first = len(ticket.job.ids), len(batch[0].job.ids)
        generates = ticket.job.sampling.max_tokens > 1
        if generates != (batch[0].job.sampling.max_tokens > 1):
            return False
        if generates and not self.backbone.mixes_lengths and length != first:
            return False
        # Sorted by length: everything is padded to this one. Beyond twice the shortest, padding costs more than a pass.
        return length * (len(batch) + 1) <= self._config.max_batch_tokens and length <= 2 * first + 16

    def _begin(self, ticket: Ticket) -> None:
        job, ticket.begun = ticket.job, True
        limit = min(job.sampling.max_tokens, self._context - len(job.ids))
        stops = job.sampling.stop_token_ids | (frozenset() if job.sampling.ignore_eos else self._endings.eos)
        device = self.backbone.device if self.backbone.device.type == "cuda" else torch.device("cpu")
        for index in range(job.n):
            seed = job.sampling.seed
            drawn = int(torch.randint(2**62, (), generator=self._seeds)) if seed is None else seed + index
            generator = torch.Generator(device).manual_seed(drawn & (2**63 - 1))
            ticket.drafts.append(GeneratedSequence(job, index, limit, stops, generator))

    def _prefill(self, batch: list[Ticket]) -> None:
        batch = [ticket for ticket in batch if not ticket.cancelled]
        if not batch:
            return
        jobs = [ticket.job for ticket in batch]
        adapter = jobs[0].adapter
        self.backbone.use_adapter(adapter)
        generates = jobs[0].sampling.max_tokens > 1
        cache = self.backbone.new_cache() if generates else None
        hidden = self.backbone.hidden(pad_right([job.ids for job in jobs], self.backbone.device), cache=cache)
        for ticket, (scores, candidate_logp) in zip(batch, score_prompts(self.backbone, jobs, hidden), strict=True):
            ticket.answer.scores, ticket.answer.candidate_logp = scores, candidate_logp
            self._begin(ticket)
        last = torch.stack([hidden[row, len(job.ids) - 1] for row, job in enumerate(jobs)])
        del hidden
        rows = [row for row, ticket in enumerate(batch) for _ in ticket.drafts]
        drafts = [draft for ticket in batch for draft in ticket.drafts]
        self.prompt_tokens += sum(len(job.ids) for job in jobs)
        for part in self.backbone.chunks(len(drafts)):
            logits = self.backbone.logits(last[rows[part]])
            draw_next(drafts[part], logits, processed=self._processed, version=self.version)
        if generates:
            self._adopt(SequenceGroup.after_prefill(self.backbone, adapter, drafts, cache, rows))
        else:
            self._endings.apply(drafts)
            self.drawn_tokens += len(drafts)
        self._settle_finished()

    def _adopt(self, group: SequenceGroup) -> None:
        self._close(group)
        if group.sequences:
            self._join(group)

    def _rebuild(self) -> None:
        """Run the tokens so far through the present weights to have caches again."""
        stale, self._stale = [draft for draft in self._stale if not draft.done], []
        for draft in stale:
            self.backbone.use_adapter(draft.job.adapter)
            cache = self.backbone.new_cache()
            ids = pad_right([draft.tokens[:-1]], self.backbone.device)
            self.backbone.hidden(ids, cache=cache)
            self._join(SequenceGroup(self.backbone, draft.job.adapter, [draft], cache))

    def _join(self, group: SequenceGroup) -> None:
        for other in self._groups:
            if other.adapter == group.adapter and self.backbone.mixes_lengths:
                other.absorb(group)
                return
        self._groups.append(group)

    def _close(self, group: SequenceGroup) -> None:
        self.drawn_tokens += len(group.sequences)
        self._endings.apply(group.sequences)
        group.drop_done()

    def _forget_cancelled(self, group: SequenceGroup) -> None:
        dead = {id(draft) for ticket in self._running if ticket.cancelled for draft in ticket.drafts}
        for draft in group.sequences:
            draft.done = draft.done or id(draft) in dead
        group.drop_done()

    def _abort_running(self) -> None:
        self._groups.clear()
        self._stale.clear()
        for ticket in self._running:
            for draft in ticket.drafts:
                self._endings.abort(draft)
        self._settle_finished()

    def _settle_finished(self) -> None:
        for ticket in [t for t in self._running if t.begun and not t.open]:
            self._running.remove(ticket)
            self._end(ticket)
        self._running = [ticket for ticket in self._running if not (ticket.cancelled and not ticket.begun)]

    def _end_unbegun(self, ticket: Ticket) -> None:
        self._begin(ticket)
        self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.answer.completions = [self._endings.finish(draft) for draft in ticket.drafts]
        settle(ticket.loop, ticket.future, ticket.answer)

    def _fail(self, error: Exception, batch: list[Ticket]) -> None:
        """The jobs of a failed pass are answered 500."""
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        refusal = Refusal(f"The model failed: {message}", status=500, kind="InternalServerError")
        for ticket in batch:
            if ticket in self._running:
                self._running.remove(ticket)
            settle(ticket.loop, ticket.future, error=refusal)
