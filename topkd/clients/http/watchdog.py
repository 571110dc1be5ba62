"""The progress watchdog: a server that falls silent is asked for a sign of life, and given up when it gives none.

A score or a completion comes in one piece, so silence alone may be honest work on a long prompt, which only the try's
own time-out bounds. A server that does not even answer ``GET /health`` works on nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from topkd.clients.http.metrics import Metrics
from topkd.topk.errors import ServerTimeoutError

_ASKED = 2  # a loop that is busy writing one large reply may miss the first


@dataclass
class _Watch:
    """What one event loop has under way at the server."""

    limits: set[asyncio.Timeout] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None
    asking: asyncio.Task[None] | None = None


class Watchdog:
    """Of one server, over every request under way there.

    Args:
        silence_s: Seconds without a byte of any reply, while requests are under way, before the server is asked;
            0 switches the watchdog off.
        answers: Asks it: one short request past admission and retries; False when nothing comes back.
        metrics: Counts ``watchdog_questions`` and ``watchdog_cuts``.
    """

    def __init__(self, silence_s: float, answers: Callable[[], Awaitable[bool]], metrics: Metrics) -> None:
        self._silence_s, self._answers, self._metrics = silence_s, answers, metrics
        self._last_byte_at = time.monotonic()
        self._watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] = weakref.WeakKeyDictionary()

    def note_bytes(self) -> None:
        """Record that bytes came from the server."""
        self._last_byte_at = time.monotonic()

    @contextlib.asynccontextmanager
    async def over(self, where: str) -> AsyncIterator[None]:
        """Watch one exchange.

        Raises:
            ServerTimeoutError: the server fell silent and gave no sign of life.
        """
        if not self._silence_s:
            yield
            return
        loop = asyncio.get_running_loop()
        watch = self._watches.setdefault(loop, _Watch())
        if not watch.limits:
            self.note_bytes()  # an idle server owes nothing: its silence counts from this request on
        limit = asyncio.timeout(None)
        try:
            async with limit:
                watch.limits.add(limit)
                if watch.timer is None and watch.asking is None:
                    self._look_in(watch, self._silence_s)
                try:
                    yield
                finally:
                    watch.limits.discard(limit)
        except TimeoutError as error:
            if not limit.expired() or isinstance(error, ServerTimeoutError):
                raise
            raise ServerTimeoutError(
                "the server makes no progress and gives no sign of life",
                where=where,
                got=f"not a byte of any reply for {self._silence_s:.3g} s, and no answer to GET /health",
                hint="check the server and the network; if the server is only slow, raise watchdog_s",
            ) from error

    async def aclose(self) -> None:
        """Stop watching in this loop."""
        watch = self._watches.pop(asyncio.get_running_loop(), None)
        if watch is None:
            return
        if watch.timer is not None:
            watch.timer.cancel()
        if watch.asking is not None:
            watch.asking.cancel()
            await asyncio.gather(watch.asking, return_exceptions=True)

    def _look_in(self, watch: _Watch, seconds: float) -> None:
        watch.timer = asyncio.get_running_loop().call_later(seconds, self._look, watch)

    def _look(self, watch: _Watch) -> None:
        watch.timer = None
        left = self._silence_s - (time.monotonic() - self._last_byte_at)
        if not watch.limits:
            return
        if left > 0:
            self._look_in(watch, left)
        else:
            watch.asking = asyncio.get_running_loop().create_task(self._ask(watch))

    async def _ask(self, watch: _Watch) -> None:
        since = self._last_byte_at
        alive = False
        try:
            for _ in range(_ASKED):
                self._metrics.add("watchdog_questions")
                alive = await self._answers() or self._last_byte_at > since
                if alive:
                    break
            self.note_bytes()
        finally:
            watch.asking = None
        if not alive:
            self._metrics.add("watchdog_cuts", len(watch.limits))
            now = asyncio.get_running_loop().time()
            for limit in list(watch.limits):
                limit.reschedule(now)
        elif watch.limits:
            self._look_in(watch, self._silence_s)
