"""An event loop whose clock stands still while there is work: order and durations do not depend on the machine."""

from __future__ import annotations

import asyncio
import functools
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

import pytest

SOCKET_GRACE_S = 0.05  # what the kernel may take to hand on bytes within one process; shorter delays are real time
_POLL_S = 0.05
_PAST_S = 1e-9  # a timer's instant is passed, whatever rounding does: one that is due a hair early would spin


class VirtualLoop(asyncio.SelectorEventLoop):
    """Moves its clock to the next timer once nothing is ready and no thread is at work; computing takes no time.

    Args:
        grace_s: Real seconds without an event before the clock moves; above 0 where bytes travel through sockets.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        self.now_s, self.grace_s, self.working = 0.0, grace_s, 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.now_s

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """As any loop; the clock stands still until the thread has ended or sleeps."""
        future = super().run_in_executor(executor, func, *args)
        self._count(1)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def sleep_in_thread(self, seconds: float) -> None:
        """What ``time.sleep`` is to a thread that ``run_in_executor`` began, on this clock."""
        woken = threading.Event()

        def wake() -> None:
            self._count(1)
            woken.set()

        def begin() -> None:
            self._count(-1)
            self.call_later(seconds, wake)

        self.call_soon_threadsafe(begin)
        woken.wait()

    def _count(self, change: int) -> None:
        self.working += change


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self._loop.working:
            return super().select(_POLL_S)
        events = super().select(min(timeout, self._loop.grace_s))
        if not events:
            self._loop.now_s += timeout + _PAST_S
        return events


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test, its loopback servers included, on a ``VirtualLoop``; the clients' clocks are the loop's."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        loop = VirtualLoop(SOCKET_GRACE_S)
        with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=lambda: loop) as runner:
            _use(loop.time, patch)
            runner.run(test(*args, **options))

    return run


def _use(clock: Callable[[], float], patch: pytest.MonkeyPatch) -> None:
    from topkd.clients.fleet.routing import Breaker
    from topkd.clients.http import watchdog
    from topkd.clients.http.admission import AdaptiveWindow
    from topkd.clients.http.retry import Total

    class Time:
        monotonic = staticmethod(clock)

    patch.setattr(watchdog, "time", Time)
    for owner in (Breaker, AdaptiveWindow, Total):
        patch.setattr(owner.__init__, "__defaults__", (clock,))
