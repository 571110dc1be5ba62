"""A replica's circuit: closed while it answers, open after failures in a row, one probe at a time to close again."""

from __future__ import annotations

import time
from collections.abc import Callable

from topkd.clients.config import ClientConfig


class Breaker:
    """Counts failures in a row; not thread-safe by itself, the fleet's lock guards it."""

    def __init__(self, config: ClientConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._failures = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def closed(self) -> bool:
        """True while requests may go."""
        return self._opened is None

    @property
    def due(self) -> bool:
        """True when an open circuit has cooled down and nobody probes yet."""
        if self._opened is None or self._probing:
            return False
        return self._clock() - self._opened >= self._config.breaker_cooldown_s

    def seconds_to_probe(self) -> float:
        """Until ``due``; 0 when it is."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._config.breaker_cooldown_s - self._clock())

    def probe(self) -> None:
        """Takes the single probe; ``success`` or ``failure`` must follow."""
        self._probing = True

    def success(self) -> None:
        """The replica answered."""
        self._failures, self._opened, self._probing = 0, None, False

    def failure(self) -> bool:
        """The replica did not; True when this opened the circuit (or kept it open after a probe)."""
        self._failures += 1
        opens = self._probing or (self._opened is None and self._failures >= self._config.breaker_failures)
        if opens:
            self._opened, self._probing = self._clock(), False
        return opens
