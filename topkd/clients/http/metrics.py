"""Counters of every decision a client takes: tries, retries, cuts, sentinels, refused replies."""

from __future__ import annotations

import threading
from collections import Counter


class Metrics:
    """Named counters, safe across threads. ``snapshot()`` is what a client shows as ``.metrics``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter; a counter that was never added to is 0."""
        with self._lock:
            self._counts[name] += amount  # type: ignore[assignment]  # Counter is typed for int; seconds are floats

    def snapshot(self) -> dict[str, float]:
        """Copy the counters, sorted by name."""
        with self._lock:
            return {name: float(self._counts[name]) for name in sorted(self._counts)}

    def __getitem__(self, name: str) -> float:
        with self._lock:
            return float(self._counts[name])
