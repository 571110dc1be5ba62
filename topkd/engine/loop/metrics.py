"""The run log: one JSON object a line, flushed line by line, strict JSON (a non-finite number is null)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from topkd.topk.errors import ConfigError, DataError

# What a run asked of its servers: after a resume the cache answers what was asked before.
TRAFFIC = frozenset({"requests", "retries", "failed_requests", "cache_hits", "scored_tokens", "teacher_bytes"})
RECORD_KINDS = ("step", "eval", "event")


class MetricsLog:
    """Appends records to ``metrics.jsonl``. A record says its ``kind``: one of ``RECORD_KINDS``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write metrics to {path}", got=error.strerror) from error

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One line; numbers that JSON cannot say are written as null."""
        self._file.write(json.dumps({"kind": kind, **make_strict_json(dict(record))}, allow_nan=False) + "\n")
        self._file.flush()

    def kept(self) -> int:
        """Bytes of the run log, all of them on disk now: a checkpoint names them, a resumed run goes on from there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path, kind: str | None = None, *, end: int | None = None) -> list[dict[str, Any]]:
    """Records of a run log, or of its first ``end`` bytes.

    A torn last line (a killed run) is left out, any other unreadable line is an error.
    """
    try:
        lines = path.read_bytes()[:end].decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError("cannot read the run log", where=str(path), got=reason.lower()) from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError("unreadable metrics line", where=f"{path}:{number}", got=line[:80]) from error
        if not isinstance(record, dict) or "kind" not in record:
            raise DataError(
                "this is no run log of a run", where=f"{path}:{number}", got=line[:80],
                expected='an object with "kind" on every line',
            )  # fmt: skip
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


def drop_timings(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without seconds (``*_s``) and traffic: what a deterministic run repeats, and a resumed one ends with."""
    return {key: value for key, value in record.items() if not key.endswith("_s") and key not in TRAFFIC}


def make_strict_json(value: Any) -> Any:
    """The value with every non-finite number as None, at any depth: what strict JSON can say."""
    if isinstance(value, dict):
        return {key: make_strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [make_strict_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
