"""Routing in a fleet: which replica takes the next try, and when a slow score is also requested from a second one.

A replica's circuit is closed while it answers, open after failures in a row; one probe at a time may close it again. A
score is hedged after the 95th percentile of waiting times, for a small share of all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from topkd.clients.config import ClientConfig

_KNOWN = 64  # replies before a percentile means anything
_KEPT = 256
_FIXED_TOKENS = 64  # what a request costs besides its tokens, in tokens: keeps short ones comparable with long ones
_SAVED = 8.0  # hedges that may be saved up in quiet times


class Breaker:
    """Counts failures in a row; not thread-safe by itself, the fleet's lock guards it."""

    def __init__(self, config: ClientConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._failures = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def closed(self) -> bool:
        """Check that requests may go."""
        return self._opened is None

    @property
    def due(self) -> bool:
        """Check that an open circuit has cooled down and nobody probes yet."""
        if self._opened is None or self._probing:
            return False
        return self._clock() - self._opened >= self._config.breaker_cooldown_s

    def seconds_to_probe(self) -> float:
        """Return the seconds until ``due``; 0 when it is."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._config.breaker_cooldown_s - self._clock())

    def probe(self) -> None:
        """Take the single probe; ``success`` or ``failure`` must follow."""
        self._probing = True

    def success(self) -> None:
        """Record a success: forget the failures and close the circuit."""
        self._failures, self._opened, self._probing = 0, None, False

    def failure(self) -> bool:
        """Record a failure; True when it opened the circuit (or kept it open after a probe)."""
        self._failures += 1
        opens = self._probing or (self._opened is None and self._failures >= self._config.breaker_failures)
        if opens:
            self._opened, self._probing = self._clock(), False
        return opens


class Hedging:
    """The budget and the patience of a fleet's hedges; one per fleet, used from its loop.

    Latencies are compared per token, because a long prompt is slow everywhere.

    Args:
        share: Hedges per score, at most; 0 switches hedging off.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._credit = 0.0
        self._rates: deque[float] = deque(maxlen=_KEPT)

    def patience_s(self, tokens: int) -> float | None:
        """Return the seconds to wait for a score of ``tokens`` before it may be hedged; None when it may not."""
        if not self.share or len(self._rates) < _KNOWN:
            return None
        return float(np.percentile(self._rates, 95)) * (tokens + _FIXED_TOKENS)

    def answered(self, seconds: float, tokens: int) -> None:
        """Record a score that came back after ``seconds``; a little more may then be hedged."""
        self._rates.append(seconds / (tokens + _FIXED_TOKENS))
        self._credit = min(_SAVED, self._credit + self.share)

    def spend(self) -> bool:
        """Take one hedge from the budget; False when there is none left."""
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True
