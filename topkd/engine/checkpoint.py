"""Checkpoints: a folder is either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topkd.engine.student import Student
from topkd.topk.errors import ConfigError


def save_student(student: Student, tokenizer: Any, path: Path, state: Mapping[str, Any]) -> Path:
    """Write model (safetensors), tokenizer and ``topkd.json`` as one loadable folder.

    Written beside its final name, flushed to disk, then renamed: a killed process leaves the former folder or none,
    never half of one.
    """
    staging = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        student.model.save_pretrained(staging)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        (staging / "topkd.json").write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")
        for file in staging.iterdir():
            _flush(file)
        _flush(staging)
        former = path.with_name(f".{path.name}.former")
        shutil.rmtree(former, ignore_errors=True)
        if path.exists():
            path.rename(former)
        staging.rename(path)
        _flush(path.parent)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write the checkpoint {path}", got=error.strerror) from error
    return path


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
