"""Jobs in progress between an event loop and the model thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TypeVar

from topkd.serve.engine.jobs import Answer, EngineJob
from topkd.serve.engine.sequences import GeneratedSequence

T = TypeVar("T")


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

    try:
        loop.call_soon_threadsafe(act)
    except RuntimeError:
        if not loop.is_closed():
            raise
