"""A number that only grows and can be waited for: how far one stage of the loop has come, as the others see it."""

from __future__ import annotations

import asyncio


class Milestone:
    """The highest value reached so far."""

    def __init__(self, value: int) -> None:
        self.value = value
        self._moved = asyncio.Event()

    def to(self, value: int) -> None:
        """Raise it to ``value``, and wake who waits."""
        if value > self.value:
            self.value = value
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()

    async def reached(self, value: int) -> None:
        """Wait until it is at least ``value``."""
        while self.value < value:
            await self._moved.wait()
