"""Whether a process is still at work on a run: the lock in its folder says so at once, its silence only in time."""

from __future__ import annotations

import platform
from pathlib import Path

LOCK = ".lock"


def is_deserted(folder: Path) -> bool:
    """No process is at work on the run: its lock is there, names this machine, and is free.

    False where that cannot be known: a folder without a lock, one that came (or is shared) from another machine, a
    platform or a file system without such locks. The lock is held only for as long as it takes to ask.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        return False
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read() == describe_machine()
    except OSError:  # held; or there is none, or none can be had here
        return False


def describe_machine() -> bytes:
    """What a lock that is held here says: copies of it elsewhere are free, whatever goes on here."""
    return platform.node().encode(errors="replace")
