"""Write files so that a reader, or a crash, leaves the former content or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def stage_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what was written takes the place of ``path`` unless the block raises."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield staged
        if staged.exists():
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole: text as UTF-8, durable before it takes the place of the former one."""
    with stage_file(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)
