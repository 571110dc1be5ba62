"""A run's folder: one run each, and what it was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import topkd
from topkd.engine.metrics import read_metrics
from topkd.topk.errors import ConfigError


def fresh_folder(out: Path) -> None:
    """Make ``out``; a folder that already holds a run is refused, so that two runs never share a diary.

    A run that ended before its first step (a mistake found late) makes room for the next.
    """
    diary = out / "metrics.jsonl"
    if diary.exists() and diary.stat().st_size and not read_metrics(diary, "step"):
        diary.unlink()
    if diary.exists():
        raise ConfigError("the output folder already holds a run", where=str(out), hint="choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the output folder", where=str(out), got=error.strerror) from error


def provenance(student: Any) -> dict[str, Any]:
    """What ran: versions, device, and the git revision when topkd itself runs from a checkout."""
    versions = {}
    for name in ("torch", "transformers", "numpy", "httpx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "topkd": topkd.__version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(student.device),
        "packages": versions,
    }


def _revision() -> str | None:
    root = Path(topkd.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, our own checkout
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
