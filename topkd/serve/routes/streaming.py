"""Server-sent events: completions that are followed token by token, and the response that carries them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from topkd.serve.engine.engine import PendingJob
from topkd.serve.engine.jobs import Completion, EngineJob
from topkd.serve.engine.refusal import Refusal
from topkd.serve.engine.served import Served
from topkd.serve.engine.texts import GrowingText
from topkd.serve.routes.replies import encode_json
from topkd.serve.routes.requests import StreamOptions
from topkd.serve.routes.wire import cancel_if_disconnected

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one completion.

    Attributes:
        job: Which of the jobs it is of.
        index: Which of the job's completions.
        drawn: Its new tokens, as places in ``out.token_ids``.
        text: Its new text; that of a token may come with a later one.
        ended: Whether it is the last one.
    """

    job: int
    index: int
    out: Completion
    drawn: range
    text: str
    ended: bool


class JobStream:
    """Jobs in progress, followed step by step. Whoever leaves it must ``close`` it.

    Raises:
        Refusal: As ``Engine.start``.
    """

    def __init__(self, served: Served, jobs: list[EngineJob]) -> None:
        self._endings, self._wake = served.endings, asyncio.Event()
        self.pending = served.engine.start(jobs, self._wake.set)
        self._sent: dict[tuple[int, int], tuple[int, GrowingText | None]] = {}  # tokens sent; no text: it has ended
        for pending in self.pending:
            pending.future.add_done_callback(lambda _: self._wake.set())

    async def follow(self) -> AsyncIterator[Delta]:
        """Yield what is new, in order of each completion's tokens, until all have ended.

        Raises:
            Refusal: The model failed on a job (500).
        """
        over = False
        while not over:
            await self._wake.wait()
            self._wake.clear()
            over = all(pending.future.done() for pending in self.pending)
            for number, pending in enumerate(self.pending):
                for delta in self._new_of(number, pending):
                    yield delta

    def close(self) -> None:
        """Cancel what has not ended."""
        for pending in self.pending:
            pending.cancel()

    def _new_of(self, number: int, pending: PendingJob) -> list[Delta]:
        drawn = pending.drawn
        if pending.future.done():
            drawn = [(len(out.token_ids), True) for out in pending.future.result().completions]
        found = []
        for index, (count, ended) in enumerate(drawn):
            sequence = pending.sequences[index]
            sent, text = self._sent.get((number, index)) or (0, self._endings.grow(sequence))
            if text is None or (count == sent and not ended):
                continue
            piece = text.finish(self._endings.finish(sequence).text) if ended else text.take(count)
            self._sent[number, index] = count, None if ended else text
            found.append(Delta(number, index, sequence.out, range(sent, count), piece, ended))
        return found


class ChunkHead:
    """What all chunks of a stream share, and its usage.

    Args:
        envelope: Fields of a reply that is not streamed.
        options: The request's ``stream_options``.
        prompt_tokens: Of each job.
    """

    def __init__(self, envelope: dict[str, Any], options: StreamOptions | None, prompt_tokens: list[int]) -> None:
        self._fields = {name: envelope[name] for name in ("id", "object", "created", "model")}
        self._fingerprint = {"system_fingerprint": envelope["system_fingerprint"]}
        self._shows = bool(options and options.include_usage)
        self._continuous = bool(self._shows and options and options.continuous_usage_stats)
        self._prompt_tokens = prompt_tokens
        self._drawn: dict[int, int] = {}

    def chunk(self, choice: dict[str, Any], job: int, drawn: int = 0, **fields: Any) -> dict[str, Any]:
        """Build a chunk with a choice of the job, of which ``drawn`` tokens are sent; the last one names the server."""
        last = choice["finish_reason"] is not None and not self._shows
        found = {**self._fields, "choices": [choice], **fields, **(self._fingerprint if last else {})}
        self._drawn[choice["index"]] = drawn
        if self._continuous:
            found["usage"] = _count_tokens(self._prompt_tokens[job], drawn)
        return found

    def closing(self) -> list[dict[str, Any]]:
        """Build the chunk with the usage, if it was asked for."""
        if not self._shows:
            return []
        counted = _count_tokens(sum(self._prompt_tokens), sum(self._drawn.values()))
        return [{**self._fields, "choices": [], **self._fingerprint, "usage": counted}]


def _count_tokens(prompt: int, drawn: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + drawn, "completion_tokens": drawn}


class EventStream(StreamingResponse):
    """A response of one event a chunk and a closing ``[DONE]``. A client that disconnects ends the jobs.

    What goes wrong once the response has begun is an event with vLLM's error body.
    """

    def __init__(self, jobs: JobStream, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(_make_events(chunks), media_type="text/event-stream")
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(Refusal):  # the client has disconnected: there is nobody to tell
                await cancel_if_disconnected(Request(scope, receive), self.stream_response(send))
        finally:
            self._jobs.close()


async def _make_events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield _make_event(chunk)
    except Refusal as refusal:
        yield _make_event(refusal.body())
    except Exception as error:
        log.exception("a stream failed")
        unforeseen = Refusal(f"{type(error).__name__}: {error}", status=500, kind="InternalServerError")
        yield _make_event(unforeseen.body())
    yield b"data: [DONE]\n\n"


def _make_event(body: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(body) + b"\n\n"
