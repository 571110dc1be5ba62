"""Names of the files in folders of runs and comparisons, and the lock that shows whether a process works there."""

from __future__ import annotations

import platform
import re
from collections.abc import Container
from pathlib import Path

RUN_LOG, CONFIG, TOKENS, STUDENT, CHECKPOINTS = "metrics.jsonl", "config.json", "tokens.jsonl", "student", "checkpoints"
LOCK = ".lock"
DEMO = "demo.json"  # of a demo: divergences and texts before and after; empty until it ends
COMPARISON, CELLS = "compare.json", "cells"  # of a comparison's folder; each cell is a run's folder


def name_cell(phase: str, arm: str, seed: int, lr: float | None = None) -> str:
    """Return the folder name of a comparison's cell; ``lr`` for a trial of a learning rate."""
    return f"{phase}-{arm}{'' if lr is None else f'-lr{lr:g}'}-seed{seed}"


def parse_cell_name(name: str, arms: Container[str]) -> tuple[str, str, str]:
    """Return phase, arm and learning rate (of a trial) of a cell's folder name; ``arms`` are known names."""
    parts = re.fullmatch(r"(live|replay|tune)-(.+)-seed\d+", name)
    if parts is None:
        return "live", name, ""
    phase, arm = parts.groups()
    trial = re.fullmatch(r"(.+)-lr([0-9.e+-]+)", arm) if phase == "tune" and arm not in arms else None
    return (phase, trial[1], trial[2]) if trial else (phase, arm, "")


def is_deserted(folder: Path) -> bool:
    """Return whether no process works on the run: its lock exists, names this machine, and is free.

    False if that cannot be known: for a folder without a lock, one that is copied or shared from another machine, or
    a platform or file system without such locks. The test itself holds the lock only for a moment.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        return False
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read() == describe_machine()
    except OSError:  # the lock is held, or it does not exist, or locks do not work here
        return False


def describe_machine() -> bytes:
    """Return this machine's name, which a lock contains, because a lock is valid on one machine only."""
    return platform.node().encode(errors="replace")
