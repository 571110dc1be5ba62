"""Admission before the connection pool: an adaptive window per replica and a memory budget shared by all.

Works from any number of event loops and threads: waiters are plain futures, woken in their own loop. (An
``asyncio.Semaphore`` belongs to one loop; a pool that queues inside is quadratic in its waiters.)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from topkd.clients.config import ClientConfig
from topkd.clients.http.metrics import Metrics
from topkd.topk.errors import ConfigError


class AdaptiveWindow:
    """Additive increase, multiplicative decrease of the requests in flight at one replica.

    Grows by one for each clean reply until the first overload (so it doubles every round trip), then by one per
    ``window_grow_after`` clean replies; halves on overload, at most once per ``window_cooldown_s``. What is in flight
    above a window that just shrank is debt: replies pay it off before anything new is admitted.
    """

    def __init__(self, config: ClientConfig, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._metrics, self._clock = config, metrics, clock
        self.size, self.in_flight = min(config.window_start, config.max_in_flight), 0
        self._clean, self._last_cut, self._probing = 0, float("-inf"), True

    @property
    def debt(self) -> int:
        """Count the requests in flight beyond the window."""
        return max(0, self.in_flight - self.size)

    def clean(self) -> None:
        """Record a reply without a sign of overload."""
        if self.in_flight + 1 < self.size:  # the window was not what held us back: growing it would be blind
            return
        self._clean += 1
        if self._clean >= (1 if self._probing else self._config.window_grow_after):
            self._clean = 0
            self.size = min(self.size + 1, self._config.max_in_flight)

    def overload(self) -> None:
        """Record a 429, a 503 or a transport failure: one event, one cut."""
        self._clean, self._probing = 0, False
        now = self._clock()
        if now - self._last_cut >= self._config.window_cooldown_s:
            self._last_cut = now
            self.size = max(1, self.size // 2)
            self._metrics.add("window_cuts")


class MemoryBudget:
    """Tokens x (K + 1) in flight, shared by every gate that is built on it."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self.lock = threading.RLock()
        self.gates: list[Admission] = []

    def fits(self, cost: int) -> bool:
        """Check that ``cost`` may go now; a request larger than the whole budget goes alone."""
        return self.used == 0 or self.used + cost <= self.capacity


@dataclass(eq=False)
class _Waiter:
    cost: int
    loop: asyncio.AbstractEventLoop
    ready: asyncio.Future[None]
    granted: bool = field(default=False)


class Permit:
    """One admitted try: holds a place in the window until the reply is whole, and budget until it is decoded."""

    def __init__(self, gate: Admission, cost: int) -> None:
        self._gate, self._cost = gate, cost
        self._in_window = self._in_budget = True

    def replied(self, *, overload: bool = False, neutral: bool = False) -> None:
        """Free the place, and record in the window how the exchange went (neutral: cancelled)."""
        if self._in_window:
            self._in_window = False
            self._gate.leave_window(overload=overload, neutral=neutral)

    def release(self) -> None:
        """Give the budget back: the reply's bytes are gone."""
        self.replied(neutral=True)
        if self._in_budget:
            self._in_budget = False
            self._gate.leave_budget(self._cost)


class Admission:
    """The door of one replica: first come, first served, at most ``max_queued`` waiting."""

    def __init__(self, config: ClientConfig, metrics: Metrics, budget: MemoryBudget | None = None) -> None:
        self._config, self._metrics = config, metrics
        self.budget = budget or MemoryBudget(config.budget_token_k)
        self.window = AdaptiveWindow(config, metrics)
        self._waiters: deque[_Waiter] = deque()

    @property
    def queued(self) -> int:
        """Count the requests waiting for admission."""
        return len(self._waiters)

    @property
    def load(self) -> int:
        """Count the requests in flight or waiting."""
        return self.window.in_flight + len(self._waiters)

    @property
    def free(self) -> bool:
        """Check that the window would let a request go at once."""
        return not self._waiters and self.window.in_flight < self.window.size

    async def enter(self, cost: int, *, where: str = "") -> Permit:
        """Wait for a place in the window and for ``cost`` of the budget, then take both."""
        with self.budget.lock:
            if self not in self.budget.gates:  # closed in one loop, used again in another
                self.budget.gates.append(self)
            if not self._waiters and self._fits(cost):
                self._take(cost)
                return Permit(self, cost)
            if len(self._waiters) >= self._config.max_queued:
                raise ConfigError(
                    "too many requests wait for admission",
                    where=where,
                    got=len(self._waiters),
                    expected=f"at most max_queued = {self._config.max_queued}",
                    hint="start a request when another is done, say behind an asyncio.Semaphore",
                )
            loop = asyncio.get_running_loop()
            waiter = _Waiter(cost, loop, loop.create_future())
            self._waiters.append(waiter)
        self._metrics.add("queued")
        try:
            await waiter.ready
        except BaseException:
            with self.budget.lock:
                if waiter.granted:
                    self._give(cost)
                else:
                    self._waiters.remove(waiter)
                self._pump_all()
            raise
        return Permit(self, cost)

    def leave_window(self, *, overload: bool, neutral: bool) -> None:
        """Free a place in the window."""
        with self.budget.lock:
            self.window.in_flight -= 1
            if overload:
                self.window.overload()
            elif not neutral:
                self.window.clean()
            self._pump()

    def leave_budget(self, cost: int) -> None:
        """Free a part of the budget."""
        with self.budget.lock:
            self.budget.used -= cost
            self._pump_all()

    def close(self) -> None:
        """Stop being woken when others give budget back."""
        with self.budget.lock:
            if self in self.budget.gates:
                self.budget.gates.remove(self)

    def _fits(self, cost: int) -> bool:
        return self.window.in_flight < self.window.size and self.budget.fits(cost)

    def _take(self, cost: int) -> None:
        self.window.in_flight += 1
        self.budget.used += cost

    def _give(self, cost: int) -> None:
        self.window.in_flight -= 1
        self.budget.used -= cost

    def _pump_all(self) -> None:
        for gate in self.budget.gates:
            gate._pump()  # noqa: SLF001 - gates on one budget are one mechanism

    def _pump(self) -> None:
        while self._waiters and self._fits(self._waiters[0].cost):
            waiter = self._waiters.popleft()
            waiter.granted = True
            self._take(waiter.cost)
            try:
                waiter.loop.call_soon_threadsafe(_wake, waiter.ready)
            except RuntimeError:  # its loop is closed: nobody will use the place
                self._give(waiter.cost)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
