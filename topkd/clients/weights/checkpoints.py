"""A checkpoint folder is checked before a server is told to load it: a failed reload can leave a server unusable."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Literal

from topkd.topk.errors import SyncError

_HEADER_LIMIT = 100 * 2**20  # safetensors' own bound

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def check_folder(path: str, kind: Literal["full", "lora"]) -> Shapes:
    """Every tensor's dtype and shape, read from the safetensors headers; a SyncError when a file is absent or torn."""
    folder = Path(path)
    config = folder / ("config.json" if kind == "full" else "adapter_config.json")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"{config.name}: {_reason(error)}") from error
    files = sorted(folder.glob("*.safetensors"))
    if kind == "lora":
        files = [file for file in files if file.name == "adapter_model.safetensors"]
    if not files:
        raise _unusable(folder, "no adapter_model.safetensors" if kind == "lora" else "no *.safetensors file")
    shapes: Shapes = {}
    for file in files:
        try:
            shapes |= _header(file)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise _unusable(folder, f"{file.name}: {_reason(error)}") from error
    return shapes


def check_same_shapes(shapes: Shapes, reference: Shapes, path: str) -> None:
    """The new checkpoint must fit what the server holds: a shape mismatch can only be cured by a restart."""
    for name in sorted(set(shapes) | set(reference)):
        new, old = shapes.get(name), reference.get(name)
        if new is None or old is None or new[1] != old[1]:
            raise SyncError(
                "the checkpoint does not fit the model that is served",
                where=f"{path}, tensor {name}",
                got="absent" if new is None else new[1],
                expected="absent" if old is None else old[1],
                hint="the server was not touched",
            )


def _header(file: Path) -> Shapes:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _HEADER_LIMIT:
            raise ValueError("header too long")
        entries: dict[str, Any] = json.loads(stream.read(length))
    size = file.stat().st_size - 8 - length
    entries.pop("__metadata__", None)
    if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size:
        raise ValueError("the file is shorter or longer than its header says")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)[:120] or type(error).__name__


def _unusable(folder: Path, reason: str) -> SyncError:
    return SyncError(
        "not a checkpoint that a server could load", where=str(folder), got=reason, hint="the server was not touched"
    )
