"""Wait for work or a stop, or for a thread that must finish; find the root of an exception group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_unless_stopped(stop: asyncio.Event, work: Awaitable[object]) -> bool:
    """Wait for the work; return False, and wait no longer, when ``stop`` is set first."""
    waiting, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        stopped.cancel()
    return not stop.is_set()


async def to_thread_uncancelled(
    function: Callable[..., T], *arguments: object
) -> tuple[T, asyncio.CancelledError | None]:
    """Run a function in a thread to its end; return the result, and a cancellation that arrived meanwhile."""
    # Weights must not change without a record of it.
    work, cancelled = asyncio.ensure_future(asyncio.to_thread(function, *arguments)), None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and work.exception() is not None:
        raise cancelled
    return work.result(), cancelled


def root_exception(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Find the error that ended an exception group, at any depth."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
