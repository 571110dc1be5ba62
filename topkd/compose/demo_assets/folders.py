"""Folders of the demo: a run folder of its own, and a scratch folder while its models are made."""

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
    """Find ``usual``, or the first of ``usual-2``, ``usual-3``, ... where nothing lies yet."""
    names = itertools.chain([usual], (usual.with_name(f"{usual.name}-{number}") for number in itertools.count(2)))
    return next(path for path in names if _is_free(path))


@contextlib.contextmanager
def open_demo_folder(out: Path | None, usual: Path, progress: Progress) -> Iterator[Path]:
    """Open a folder that holds nothing but this demo's summary; what raises within leaves it as it was.

    ``out`` must be new or empty; None takes ``usual``, or a free folder beside it: nothing is ever written over.
    """
    while True:
        folder = out or find_free_folder(usual)
        if out is not None and not _is_free(out):
            raise ConfigError(
                "the demo's --out is " + ("not empty" if out.is_dir() else "no folder"), where=str(out),
                expected="a new or an empty folder", hint="choose another: the demo writes over nothing",
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
        progress.note(f"{usual} is there already and stays as it is: this demo goes to {folder}")
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
    """Open a folder to make ``beside`` in, for one process at a time; gone afterwards, with those of dead processes."""
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
    """Take the lock, waiting for whoever has it; False where files have no such locks."""
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
