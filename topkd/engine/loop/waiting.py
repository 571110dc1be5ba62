"""Waiting: for work or a stop, for a thread that must finish, and the root of an exception group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_unless_stopped(stop: asyncio.Event, work: Awaitable[object]) -> bool:
    """Wait for the work; False when ``stop`` is set first, and the waiting is given up."""
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
    """Run in a thread to the end; return the result, and a cancellation that came meanwhile."""
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
    """Find the error that ended a group, however deep."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
