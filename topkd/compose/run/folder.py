"""The folder of a run: it holds one run, is locked by one process, and records the versions that made the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import topkd
from topkd.engine.loop.metrics import RECORD_KINDS, read_metrics
from topkd.report.load.run_folder import CHECKPOINTS, CONFIG, LOCK, RUN_LOG, STUDENT, describe_machine
from topkd.topk.errors import ConfigError

_TRIES = 5  # attempts to lock a run's folder
_PACKAGES = ("torch", "transformers", "safetensors", "peft", "tokenizers", "numpy", "httpx", "vllm")


def check_free(out: Path) -> None:
    """Raise if a new run must not use ``out``: a run there has taken a step, or the folder has files of others.

    A folder whose run ended before its first step may be used again.
    """
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:  # else the first weights could not be written
        raise ConfigError(
            "the output folder's name is not UTF-8", where=str(out), hint="choose another --out"
        ) from error
    others = _list_entries(out)
    if others is None:
        return
    run_log = out / RUN_LOG
    begun = run_log.exists() and run_log.stat().st_size > 0
    records = read_metrics(run_log) if begun else []
    ours = all(record["kind"] in RECORD_KINDS for record in records) if records else _is_run_config(out / CONFIG)
    if others and not ours:
        raise ConfigError(
            "the output folder holds files that are not a run's", where=str(out), got=", ".join(others[:3]),
            expected="a new or an empty folder", hint="choose another --out: topkd does not overwrite other files",
        )  # fmt: skip
    if any(record["kind"] == "step" for record in records) or not {STUDENT, CHECKPOINTS}.isdisjoint(others):
        raise ConfigError(
            "the output folder already holds a run", where=str(out), hint="choose another --out, or use --resume"
        )


def check_resumable(out: Path) -> None:
    """Raise if a folder holds no run that can be resumed."""
    if CONFIG not in (_list_entries(out) or []):
        raise ConfigError("there is no run to resume", where=str(out), hint="leave out --resume")


def _list_entries(out: Path) -> list[str] | None:
    """List the names in a folder, in order; return None if there is no folder.

    Names that begin with a dot are left out: a lock, or the incomplete config of a run that was killed at its start.
    """
    try:
        if not out.exists():
            return None
        if not out.is_dir():
            raise ConfigError("the output folder is a file", where=str(out), hint="choose another --out")
        return sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ConfigError("the output folder cannot be read", where=str(out), got=error.strerror) from error


def prepare_folder(out: Path) -> None:
    """Make ``out``, or remove the log of a run that took no step; see ``check_free`` for folders that are refused."""
    check_free(out)
    try:
        (out / RUN_LOG).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the output folder", where=str(out), got=error.strerror) from error


def _is_run_config(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"rollout", "learner", "objective"} <= values.keys()


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Lock a folder against other processes until the context ends or this process dies; make a missing folder."""
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("ab", buffering=0)
    except OSError as error:
        raise ConfigError("cannot make the output folder", where=str(out), got=error.strerror) from error
    with file:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not left:
                    raise ConfigError("another process is at work on this run", where=str(out)) from None
                time.sleep(0.02)  # a report that tests the lock holds it for a moment
        with contextlib.suppress(OSError):  # on a full disk the lock does not name its holder
            file.truncate(0)
            file.write(describe_machine())
        yield


def collect_provenance(student: Any) -> dict[str, Any]:
    """Collect versions, device, threads, and git revisions: of topkd's checkout, and of the folder it is run from."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = student.device
    return {
        "topkd": topkd.__version__,
        "revision": find_revision(Path(topkd.__file__).parent.parent, own=True),
        "project_revision": find_revision(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def find_revision(folder: Path, *, own: bool = False) -> str | None:
    """Find the git revision of a checkout, with "-dirty" when tracked files differ from it; None outside of one.

    ``own``: only when ``folder`` itself is the checkout, not a folder within another one.
    """
    if own and not (folder / ".git").exists():
        return None
    head = _run_git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _run_git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _run_git(folder: Path, *words: str) -> str | None:
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
