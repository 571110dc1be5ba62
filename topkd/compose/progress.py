"""Progress of long work. The library never prints: a command passes a ``Progress``."""

from __future__ import annotations

from typing import Any


class Progress:
    """Receives what goes on; this one is silent. Commands override what they show."""

    def note(self, text: str) -> None:
        """Show a line that is worth reading once."""

    def stage(self, name: str, total: int) -> None:
        """Begin work of ``total`` units."""

    def advance(self, done: int, detail: str = "") -> None:
        """Show that ``done`` units of the present stage are finished."""

    def record(self, kind: str, record: dict[str, Any]) -> None:
        """Show a run log entry."""
