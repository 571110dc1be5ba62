"""Whether a process is still at work on a run: the lock in its folder says so at once, its silence only in time."""

from __future__ import annotations

from pathlib import Path

LOCK = ".lock"


def deserted(folder: Path) -> bool:
    """No process of this machine is at work on the run: its lock is there, and free.

    False where that cannot be known: a folder without a lock (it came from elsewhere), a platform or a file system
    without such locks. The lock is held only for as long as it takes to ask.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        return False
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held; or there is none, or none can be had here
        return False
    return True
