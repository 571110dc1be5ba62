"""Stops a run on SIGTERM or Ctrl-C: the signal becomes a request that the loop obeys between two steps."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Inside ``with``, the first signal asks the run to stop, and a second one interrupts it at once.

    Before and after the run itself (for example while a model is loaded) there is nothing to save: Ctrl-C raises
    KeyboardInterrupt, and SIGTERM exits with status 0, both at once. Outside the main thread, signals are not changed.

    Attributes:
        name: The signal that asked for the stop; "" if there was none.
    """

    def __init__(self) -> None:
        self.name = ""
        self._leaving_by: signal.Signals | None = None  # a signal from before the run
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._request_stop) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    @contextlib.contextmanager
    def listen(self) -> Iterator[asyncio.Event]:
        """Yield the event that a signal sets; call it inside a running event loop."""
        self.obey()
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        try:
            yield self._event
        finally:
            self._loop = self._event = None

    def obey(self) -> None:
        """Exit now, if a signal from before the run should have ended this process and did not.

        Python drops an exception that a handler raises during a ``__del__``, so long work calls this between its steps.
        """
        if self._leaving_by is not None:
            self._leave(self._leaving_by)

    def _leave(self, number: signal.Signals) -> NoReturn:
        self._leaving_by = number
        if number == signal.SIGTERM:
            sys.exit(0)
        raise KeyboardInterrupt

    def _request_stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - how Python calls handlers
        if self._loop is not None and self._event is not None and not self.name:
            self.name = signal.Signals(number).name
            self._loop.call_soon_threadsafe(self._event.set)
        elif self._loop is None:
            self._leave(signal.Signals(number))
        else:
            raise KeyboardInterrupt
