"""What long work tells whoever shows it. The library never prints: a command hands in a ``Progress``."""

from __future__ import annotations

from typing import Any


class Progress:
    """Told what goes on; this one is silent. Commands override what they show."""

    def note(self, text: str) -> None:
        """A line worth reading once."""

    def stage(self, name: str, total: int) -> None:
        """Work of ``total`` units begins."""

    def advance(self, done: int, detail: str = "") -> None:
        """``done`` units of the present stage are finished."""

    def record(self, kind: str, record: dict[str, Any]) -> None:
        """A run log entry was written."""
