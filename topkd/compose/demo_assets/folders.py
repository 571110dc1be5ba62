"""Folders of the demo: its run folder, and a temporary folder in which its models are made."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from topkd.compose.progress import Progress
from topkd.report.load.run_folder import DEMO
from topkd.topk.errors import ConfigError


def find_free_folder(usual: Path) -> Path:
    """Find ``usual``, or the first of ``usual-2``, ``usual-3``, ... that is missing or empty."""
    names = itertools.chain([usual], (usual.with_name(f"{usual.name}-{number}") for number in itertools.count(2)))
    return next(path for path in names if _is_free(path))


@contextlib.contextmanager
def open_demo_folder(out: Path | None, usual: Path, progress: Progress) -> Iterator[Path]:
    """Make a folder that holds only this demo's summary; undo that if an exception is raised inside.

    ``out`` must be new or empty; None takes ``usual``, or an unused folder beside it. Nothing is ever overwritten.
    """
    while True:
        folder = out or find_free_folder(usual)
        if out is not None and not _is_free(out):
            raise ConfigError(
                "the demo's --out is not " + ("empty" if out.is_dir() else "a folder"), where=str(out),
                expected="a new or an empty folder", hint="choose another: the demo overwrites nothing",
            )  # fmt: skip
        there = folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DEMO).open("x", encoding="utf-8").close()
            break
        except OSError as error:
            if isinstance(error, FileExistsError) and not _is_free(folder):
                continue  # another demo came first: look again
            raise ConfigError("cannot make the output folder", where=str(folder), got=error.strerror) from error
    if folder not in (out, usual):
        progress.note(f"{usual} already exists and is not changed: this demo writes to {folder}")
    try:
        yield folder
    except BaseException:
        (folder / DEMO).unlink(missing_ok=True)
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def open_scratch_folder(beside: Path, progress: Progress) -> Iterator[Path]:
    """Make a temporary folder for the contents of ``beside``, under a lock; remove it, and those of dead processes."""
    prefix = f".{beside.name}-"
    with contextlib.ExitStack() as stack:
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            if _take_lock(stack.enter_context((beside.parent / ".lock").open("a")), progress):
                for left in beside.parent.glob(f"{prefix}*"):
                    shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=prefix, dir=beside.parent))
        except OSError as error:
            raise ConfigError("cannot write to the cache", where=str(beside.parent), got=error.strerror) from error
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        yield staging


def _take_lock(file: TextIO, progress: Progress) -> bool:
    """Take the lock, when its holder has released it; return False if the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.note("waiting for another process that makes the same models")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a network's file system without locks
        return False
    return True


def _is_free(path: Path) -> bool:
    try:
        return not path.is_symlink() and (not path.exists() or (path.is_dir() and not any(path.iterdir())))
    except OSError as error:
        raise ConfigError("cannot look into the output folder", where=str(path), got=error.strerror) from error
