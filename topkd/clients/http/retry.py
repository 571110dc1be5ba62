"""The one owner of retries, and the only module that knows tenacity.

Tried again: no connection, a connection that broke, time-outs, 408, 409, 429 and 5xx, and (for scoring, which may be
repeated without changing anything) a reply that failed its checks. Never: any other 4xx, a reply of a sampling
request, anything past the total time. ``Retry-After`` is a floor; pauses of our own have full jitter.
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
from topkd.topk.errors import ResponseError, RetryableServerError, ServerTimeoutError, TopkdError

Result = TypeVar("Result")


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


@dataclass(frozen=True, slots=True)
class Try:
    """What a try knows: its number from 0, the time it shares with the others, and why the one before failed."""

    number: int
    total: Total
    failure: TopkdError | None = None


async def with_retries(
    attempt: Callable[[Try], Awaitable[Result]],
    config: ClientConfig,
    metrics: Metrics,
    *,
    response_retries: int = 0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Result:
    """Run ``attempt`` until it succeeds, cannot succeed, or its tries or its time are used up.

    The last error is raised as it came, with the number of tries added to its message when there was more than one.
    """
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
                    return await attempt(Try(number - 1, total, failure))
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
        if not isinstance(error, RetryableServerError):
            return False
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
