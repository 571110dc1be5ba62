"""The folder of a cache: one small file names the format and its version."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from topkd.files import write_atomically
from topkd.offline.store.segments import list_segments, make_version_error
from topkd.topk.errors import CacheError

FORMAT_FILE = "topkd-store.json"
FORMAT_VERSION = 1  # of the folder; each segment has its own
_BEGUN = f".{FORMAT_FILE}."


def open_folder(path: Path, *, create: bool) -> None:
    """Check that a folder is a cache of a readable version; create one if ``create`` is set."""
    marker = path / FORMAT_FILE
    if create:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not marker.exists() and (list_segments(path) or _nothing_in(path)):
                # Several writers may do this at once; all write the same content.
                write_atomically(marker, json.dumps({"format": "topkd-store", "version": FORMAT_VERSION}) + "\n")
        except OSError as error:
            if path.exists() and not path.is_dir():
                raise _no_cache(path) from error
            raise describe_disk_error("cannot create the cache", path, error) from error
    if not path.is_dir() or not marker.exists():
        raise _no_cache(path)
    try:
        described = json.loads(marker.read_text())
        version = int(described["version"])
    except OSError as error:
        raise CacheError("cannot read the cache", where=str(marker), got=error.strerror) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            "the cache's format file is damaged", where=str(marker),
            expected=json.dumps({"format": "topkd-store", "version": FORMAT_VERSION}),
            hint="write the expected text into it: the records are in the segments",
        ) from error  # fmt: skip
    if version > FORMAT_VERSION:
        raise make_version_error(path, version)


def _nothing_in(path: Path) -> bool:
    """Return whether a folder is empty except for temporary files of writers that create a cache."""
    return all(entry.name.startswith(_BEGUN) and entry.name.endswith(".tmp") for entry in path.iterdir())


@contextlib.contextmanager
def begin_cache(path: Path) -> Iterator[None]:
    """Remove a cache that was created in the block if an error leaves it without a record."""
    there, was_cache = path.exists(), (path / FORMAT_FILE).exists()
    try:
        yield
    except BaseException:
        if not was_cache and path.is_dir() and not list_segments(path):
            with contextlib.suppress(OSError):  # other files there are not ours, and stay
                (path / FORMAT_FILE).unlink(missing_ok=True)
                if not there:
                    path.rmdir()
        raise


def describe_disk_error(what: str, path: Path, error: OSError) -> CacheError:
    """Build the CacheError of a failed write: exit code 1 for a full disk, 2 for a folder that cannot be written."""
    refused = CacheError(what, where=str(path), got=error.strerror or str(error))
    refused.exit_code = 1 if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO} else 2
    return refused


def _no_cache(path: Path) -> CacheError:
    """Build the error for a path that is not a cache."""
    if not path.exists():
        error = CacheError("no such file or folder", where=str(path), expected="the folder of a cache")
    elif not path.is_dir():
        error = CacheError("not a topkd cache", where=str(path), got="a file", expected="a folder")
    else:
        error = CacheError(
            "not a topkd cache", where=str(path), got=f"a folder without {FORMAT_FILE}",
            hint="a new cache needs an empty folder, or one that does not exist yet",
        )  # fmt: skip
    error.exit_code = 2
    return error
