"""Child processes that hear Ctrl-C wherever the tests run."""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def interruptible(command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """A child that SIGINT reaches: a test run in the background ignores it, and children would inherit that."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([*map(str, command)], text=True, **options)
    finally:
        signal.signal(signal.SIGINT, former)
