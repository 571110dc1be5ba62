"""The one owner of retries, and the only module that knows tenacity.

Tried again: no connection, a connection that broke, time-outs, 408, 409, 429 and 5xx, and (for scoring, which may be
repeated without changing anything) a reply that failed its checks. Never: any other 4xx, a reply of a sampling
request, anything past the total time. ``Retry-After`` is a floor; pauses of our own have full jitter.

A server that is paused for new weights is waited for apart from all this: it ran nothing, so sending the request again
is no try, and how long a push takes says nothing about the server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from topkd.clients.config import ClientConfig
from topkd.clients.http.metrics import Metrics
from topkd.clients.http.status_errors import is_repeating
from topkd.topk.errors import ResponseError, RetryableServerError, ServerPausedError, ServerTimeoutError, TopkdError

Result = TypeVar("Result")
_FIRST_WAIT_S, _LONGEST_WAIT_S, _WAIT_GROWTH = 0.25, 5.0, 1.5  # for a paused server


class Total:
    """The time all tries of one request share. It runs from admission: waiting for a turn is not the server's fault."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock, once."""
        if self._started is None:
            self._started = self._clock()

    @property
    def spent_s(self) -> float:
        """Return the seconds since the start; 0 before it."""
        return 0.0 if self._started is None else self._clock() - self._started

    @property
    def remaining_s(self) -> float:
        """Return the seconds left."""
        return self._limit_s - self.spent_s

    def extend(self, seconds: float) -> None:
        """Add the time that went by while the server was paused."""
        self._limit_s += seconds


@dataclass(frozen=True, slots=True)
class Try:
    """What a try knows: its number from 0, the time it shares with the others, and why the one before failed."""

    number: int
    total: Total
    failure: TopkdError | None = None


class PauseBudget:
    """The time that one request may wait for a paused server, over all its tries.

    Args:
        config: Has the bound, ``pause_timeout_s``.
        metrics: Counts ``pauses`` and ``pause_s``.
        is_paused: Asks the server; False also where it does not tell: the request, sent again, shows it.
        sleep: In place of ``asyncio.sleep``.
    """

    def __init__(
        self,
        config: ClientConfig,
        metrics: Metrics,
        is_paused: Callable[[], Awaitable[bool]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._limit_s, self._metrics, self._is_paused, self._sleep = config.pause_timeout_s, metrics, is_paused, sleep
        self._waited_s, self._next_s = 0.0, _FIRST_WAIT_S

    async def outlast(self, attempt: Callable[[Try], Awaitable[Result]], this_try: Try) -> Result:
        """Run one try, again after each pause of the server."""
        while True:
            try:
                return await attempt(this_try)
            except ServerPausedError as error:
                await self._wait(error, this_try.total)

    async def _wait(self, error: ServerPausedError, total: Total) -> None:
        if self._limit_s:
            self._metrics.add("pauses")
        while True:
            wait_s = min(self._limit_s - self._waited_s, self._next_s * random.uniform(0.5, 1.0))  # noqa: S311
            if wait_s <= 0:
                raise self._explain(error)
            self._next_s = min(_LONGEST_WAIT_S, self._next_s * _WAIT_GROWTH)
            self._waited_s += wait_s
            total.extend(wait_s)
            self._metrics.add("pause_s", wait_s)
            await self._sleep(wait_s)
            if not await self._is_paused():
                return

    def _explain(self, error: ServerPausedError) -> ServerPausedError:
        if not self._waited_s:
            return error
        return ServerPausedError(
            f"gave up waiting for a paused server: {error.what}",
            where=error.where,
            got=f"no reply after {self._waited_s:.3g} s of waiting",
            expected=f"a resume within pause_timeout_s = {self._limit_s:.3g}",
            hint="if the job that paused it is gone, resume it (vLLM: POST /resume), else raise pause_timeout_s",
        )


async def _not_known() -> bool:
    """Leave it to the request, sent again, to show whether the server is still paused."""
    return False


async def with_retries(
    attempt: Callable[[Try], Awaitable[Result]],
    config: ClientConfig,
    metrics: Metrics,
    *,
    response_retries: int = 0,
    is_paused: Callable[[], Awaitable[bool]] = _not_known,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Result:
    """Run ``attempt`` until it succeeds, cannot succeed, or its tries or its time are used up.

    The last error is raised as it came, with the number of tries added to its message when there was more than one.
    """
    pauses = PauseBudget(config, metrics, is_paused, sleep)
    total = Total(config.total_timeout_s)
    policy = _Policy(config, response_retries, total)
    failure: TopkdError | None = None
    number = 0

    def note(state: tenacity.RetryCallState) -> None:
        metrics.add("retries")
        metrics.add("backoff_s", state.upcoming_sleep)

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(policy.again),
        wait=policy.pause,
        stop=policy.enough,
        before_sleep=note,
        sleep=sleep,
        reraise=True,
    )
    try:
        async for this_attempt in retrying:
            with this_attempt:
                number = this_attempt.retry_state.attempt_number
                try:
                    return await pauses.outlast(attempt, Try(number - 1, total, failure))
                except TopkdError as error:
                    total.start()
                    failure = error
                    raise
    except TopkdError as error:
        metrics.add("failed_requests")
        metrics.add(f"failed_{type(error).__name__}")
        if number > 1:
            _count(error, number, total.spent_s)
        raise
    raise AssertionError("tenacity ended without a result")  # pragma: no cover - it returns or raises


class _Policy:
    """When to go on, and how long to pause before."""

    def __init__(self, config: ClientConfig, response_retries: int, total: Total) -> None:
        self._config, self._response_retries, self._total = config, response_retries, total
        self._repeating = self._responses = 0

    def again(self, error: BaseException) -> bool:
        if isinstance(error, ResponseError):
            self._responses += 1
            return self._responses <= self._response_retries
        if not isinstance(error, RetryableServerError) or isinstance(error, ServerPausedError):
            return False  # a pause that is met here has used up its own budget
        if is_repeating(error):
            self._repeating += 1
            return self._repeating <= 1
        return (error.retry_after_s or 0.0) <= self._config.retry_after_max_s

    def pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        ceiling = min(self._config.backoff_max_s, self._config.backoff_s * 2.0 ** (state.attempt_number - 1))
        jitter = random.uniform(0.0, ceiling)  # noqa: S311 - spreads load, hides nothing
        wish = error.retry_after_s if isinstance(error, RetryableServerError) else None
        # Above a stated wish a little jitter is enough to keep the waiting clients from returning as one.
        return jitter if wish is None else wish + min(jitter, 0.25 * wish + 0.05)

    def enough(self, state: tenacity.RetryCallState) -> bool:
        if state.attempt_number > self._config.max_retries:
            return True
        return state.upcoming_sleep >= self._total.remaining_s


def _count(error: TopkdError, tries: int, seconds: float) -> None:
    note = f"gave up after {tries} tries in {seconds:.1f} s"
    if isinstance(error, ServerTimeoutError):
        note += " (total_timeout_s, max_retries)"
    error.hint = f"{note}; {error.hint}" if error.hint else note
    error.args = (f"{error.args[0]} [{note}]",) if error.args else (note,)
