"""A run's folder: one run each, one process at a time, and what it was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import topkd
from topkd.engine.metrics import read_metrics
from topkd.topk.errors import ConfigError

DIARY, CONFIG, TOKENS, STUDENT = "metrics.jsonl", "config.json", "tokens.jsonl", "student"
_PACKAGES = ("torch", "transformers", "safetensors", "peft", "tokenizers", "numpy", "httpx", "vllm")


def fresh_folder(out: Path) -> None:
    """Make ``out``; a folder that already holds a run is refused, so that two runs never share a diary.

    A run that ended before its first step (a mistake found late) makes room for the next.
    """
    diary = out / DIARY
    if diary.exists() and diary.stat().st_size and not read_metrics(diary, "step"):
        diary.unlink()
    if diary.exists():
        raise ConfigError(
            "the output folder already holds a run", where=str(out), hint="choose another --out, or go on with --resume"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the output folder", where=str(out), got=error.strerror) from error


@contextlib.contextmanager
def claimed(out: Path, *, resume: bool = False) -> Iterator[None]:
    """Keeps other processes out of a run's folder (made now, or there to be resumed) until this one leaves or dies."""
    if resume and not (out / CONFIG).exists():
        raise ConfigError("there is no run to resume", where=str(out), hint="leave out --resume")
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")
    except OSError as error:
        raise ConfigError("cannot make the output folder", where=str(out), got=error.strerror) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("another process is at work on this run", where=str(out)) from None
        yield


def provenance(student: Any) -> dict[str, Any]:
    """What ran: versions, device, threads, and git revisions: of topkd's checkout, and of the folder it is run from."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = student.device
    return {
        "topkd": topkd.__version__,
        "revision": revision(Path(topkd.__file__).parent.parent, own=True),
        "project_revision": revision(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def revision(folder: Path, *, own: bool = False) -> str | None:
    """The git revision of a checkout, with "-dirty" when tracked files differ from it; None outside of one.

    ``own``: only when ``folder`` itself is the checkout, not a folder within another one.
    """
    if own and not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(folder), *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None
