"""Folders that are complete or absent: written under a temporary name, flushed, renamed, and checked before use.

A snapshot's ``manifest.json`` is written last and names every other file with its size and checksum (XXH3, 128 bits).
A snapshot that is incomplete, changed or without a manifest is never used: the one before it is used instead, and the
caller gets the reason.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from topkd.topk.errors import ConfigError, TopkdError, TrainingError

MANIFEST = "manifest.json"
FORMAT = 1
_PREFIX = "step-"


def name_of(step: int) -> str:
    """Name the snapshot folder of ``step``."""
    return f"{_PREFIX}{step:08d}"


def write_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Write the folder ``path`` with the files that ``fill`` creates; a killed process leaves the old folder or none.

    Raise ConfigError if the folder cannot be written, TrainingError if the disk is full; no partial folder stays.
    """
    from safetensors import SafetensorError

    staging, former = (path.with_name(f".{path.name}.{state}") for state in ("partial", "former"))
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        fill(staging)
        for entry in sorted(staging.rglob("*")):
            _flush(entry)
        _flush(staging)
        shutil.rmtree(former, ignore_errors=True)
        if path.exists():
            path.rename(former)
        staging.rename(path)
        _flush(path.parent)
        shutil.rmtree(former, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _convert_write_error(path, error) from error
    return path


def _convert_write_error(path: Path, error: Exception) -> TopkdError:
    reason = getattr(error, "strerror", None) or str(error)
    if "No space left" in reason or getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}:
        return TrainingError("cannot write the folder", where=str(path), got=reason, hint="free space on the disk")
    return ConfigError("cannot write the folder", where=str(path), got=reason)


def write_snapshot(root: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Write the snapshot of ``step`` under ``root``, then delete all but the newest ``keep``."""

    def whole(folder: Path) -> None:
        fill(folder)
        files = {file.name: describe_file(file) for file in sorted(folder.iterdir())}
        for file in folder.iterdir():
            _flush(file)  # before the manifest with their checksums exists
        text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    path = write_folder(root / name_of(step), whole)
    for older in _list_candidates(root)[keep:]:  # renamed first: a kill while deleting leaves no half
        older.rename(older.with_name(f".{older.name}.former"))
    for left in (*root.glob(f".{_PREFIX}*.partial"), *root.glob(f".{_PREFIX}*.former")):
        shutil.rmtree(left, ignore_errors=True)
    return path


def find_newest_snapshot(root: Path, on_damaged: Callable[[str], None]) -> Path | None:
    """Find the newest complete snapshot, or None; call ``on_damaged`` with the reason for each damaged one."""
    for path in _list_candidates(root):
        fault = find_fault(path)
        if fault is None:
            return path
        on_damaged(f"checkpoint {path.name} is not used: {fault}")
    return None


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a snapshot, or None; every file is compared with the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        form, files = manifest["format"], dict(manifest["files"])
    except OSError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    if form != FORMAT:
        return f"it has format {form}, this topkd reads {FORMAT}"
    for name, expected in files.items():
        try:
            found = describe_file(path / name)
        except OSError:
            return f"{name} is missing"
        if found != expected:
            return f"{name} has another size or checksum than when it was written"
    return None


def _list_candidates(root: Path) -> list[Path]:
    folders = (path for path in root.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit() and path.is_dir())
    return sorted(folders, key=lambda path: int(path.name[len(_PREFIX) :]), reverse=True)


def describe_file(file: Path) -> dict[str, int | str]:
    """Compute size and checksum of a file."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as data:
        while part := data.read(1 << 22):
            digest.update(part)
    return {"bytes": file.stat().st_size, "xxh3_128": digest.hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
