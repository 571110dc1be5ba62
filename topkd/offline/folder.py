"""What makes a folder a cache: one small file that names the format and its version."""

from __future__ import annotations

import json
import os
from pathlib import Path

from topkd.offline.segments import segment_paths
from topkd.topk.errors import CacheError

FORMAT_FILE = "topkd-store.json"
FORMAT_VERSION = 1


def open_folder(path: Path, *, create: bool) -> None:
    """Checks that a folder is a cache of a version this code reads; makes it one when asked to."""
    marker = path / FORMAT_FILE
    if create:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not marker.exists() and (segment_paths(path) or not any(path.iterdir())):
                temporary = path / f".{FORMAT_FILE}.{os.getpid()}.tmp"
                temporary.write_text(json.dumps({"format": "topkd-store", "version": FORMAT_VERSION}) + "\n")
                temporary.replace(marker)  # several writers may do this at once, with the same content
        except OSError as error:
            raise CacheError("cannot create the cache", where=str(path), got=error.strerror) from error
    try:
        described = json.loads(marker.read_text())
        version = int(described["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            "not a topkd cache", where=str(path), got=type(error).__name__, expected=f"a folder with {FORMAT_FILE}"
        ) from error
    if version > FORMAT_VERSION:
        raise CacheError(
            "the cache was written by a newer topkd",
            where=str(path),
            got=f"format {version}",
            expected=f"at most {FORMAT_VERSION}",
            hint="upgrade topkd",
        )
