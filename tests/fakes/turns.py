"""Waiting for an event loop by its turns: enough of them settle whatever needs no thread, socket or timer."""

import asyncio


async def turns(count: int = 100) -> None:
    """Let every task that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)
