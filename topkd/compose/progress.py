"""Progress of long work. The library never prints: a command passes a ``Progress``."""

from __future__ import annotations

from typing import Any


class Progress:
    """Receives the progress of a command. This class shows nothing; subclasses override what they show."""

    def note(self, text: str) -> None:
        """Show a line of text."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` units of work."""

    def advance(self, done: int, detail: str = "") -> None:
        """Show that ``done`` units of the current stage are finished."""

    def record(self, kind: str, record: dict[str, Any]) -> None:
        """Show a run log entry."""
