"""What a run or a cell was given, told by its content: a file that changed under its name is another file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from topkd.compose.folders import DIARY
from topkd.engine.data import PromptRow
from topkd.engine.metrics import read_metrics
from topkd.engine.snapshots import file_entry
from topkd.topk.errors import DataError


def rows_note(rows: Sequence[PromptRow]) -> dict[str, Any]:
    """What the diary's first event says of a run's prompts: how many, and a digest of every one."""
    digest = xxhash.xxh3_128()
    for row in rows:
        names = [row.teacher_id, row.sample_id, row.columns]
        digest.update(json.dumps(names, sort_keys=True, default=_shown, skipkeys=True).encode())
        for array in (row.prompt_ids, row.teacher_prompt_ids, row.completion_ids, row.completion_mask):
            digest.update(b"-" if array is None else b"%d:" % array.size + array.tobytes())
    return {"rows": len(rows), "xxh3_128": digest.hexdigest()}


def _shown(value: Any) -> str:
    """A column that JSON has no word for (a date, an image); where it lies in memory is another place in each run."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))


def check_same_rows(out: Path, note: dict[str, Any], where: str) -> None:
    """Raises DataError where the diary says that the run began with other prompts; one that says nothing passes."""
    events = read_metrics(out / DIARY, "event") if (out / DIARY).exists() else []  # one machine of several has it
    began = next((event["prompts"] for event in events if "prompts" in event), note)
    if began != note:
        raise DataError(
            "the prompts are not those that the run began with",
            where=where,
            got=_told(note),
            expected=_told(began),
            hint="put the former file back, or start a new run in another --out",
        )


def _told(note: dict[str, Any]) -> str:
    return f"{note['rows']} rows, digest {note['xxh3_128'][:8]}"


def content_digest(path: Path) -> str:
    """Of a file, or of a folder's files and their names; "" where there is none."""
    digest = xxhash.xxh3_128()
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat()
            name, content = file.relative_to(path), _file_digest(file, stat.st_size, stat.st_mtime_ns)
            digest.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
    except OSError:
        return ""  # who opens it says what is wrong with it
    return digest.hexdigest()


@cache  # of every file: a bounded one that a folder overflows would read all of it again for each cell
def _file_digest(file: Path, _size: int, _changed: int) -> str:
    return str(file_entry(file)["xxh3_128"])
