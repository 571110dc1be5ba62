"""Digests of the content of data and weights: a file that has changed gets another digest."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from topkd.engine.checkpoint.snapshots import describe_file
from topkd.engine.loop.prompts import PromptRow


def describe_rows(rows: Sequence[PromptRow]) -> dict[str, Any]:
    """Describe a run's prompts for the run log: how many, and a digest of all."""
    digest = xxhash.xxh3_128()
    for row in rows:
        names = [row.teacher_id, row.sample_id, row.columns]
        digest.update(json.dumps(names, sort_keys=True, default=_to_text, skipkeys=True).encode())
        for array in (row.prompt_ids, row.teacher_prompt_ids, row.completion_ids, row.completion_mask):
            digest.update(b"-" if array is None else b"%d:" % array.size + array.tobytes())
    return {"rows": len(rows), "xxh3_128": digest.hexdigest()}


def _to_text(value: Any) -> str:
    """Write a column that JSON cannot hold (a date, an image), without its address in memory."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))


def digest_contents(path: Path) -> str:
    """Digest a file, or a folder's files and their names; "" where there is none."""
    digest = xxhash.xxh3_128()
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat()
            name, content = file.relative_to(path), _digest_file(file, stat.st_size, stat.st_mtime_ns)
            digest.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
    except OSError:
        return ""  # the error is raised where the file is opened
    return digest.hexdigest()


@cache  # unbounded: a cache with less room than a folder has files would read all of them again for each cell
def _digest_file(file: Path, _size: int, _changed: int) -> str:
    return str(describe_file(file)["xxh3_128"])


def digest_weights(student: Any) -> str:
    """Return a hash of all weights of a model."""
    import torch

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(student.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
