"""The run log (one strict JSON object a line, a non-finite number is null), and alarms from its step records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from topkd.topk.errors import ConfigError, DataError

# Fields about requests to servers: after a resume the cache answers requests that were made before.
TRAFFIC = ("requests", "retries", "failed_requests", "cache_hits", "scored_tokens", "teacher_bytes")
RECORD_KINDS = ("step", "eval", "event")

# Alarms.
WINDOW = 5  # steps that are averaged: one step's completions differ by chance
TRUNCATED = 0.5  # share of completions cut at the limit
LENGTH_FACTOR = 2.0  # against the first steps of the run
EOS_FACTOR = 0.1
MISMATCH_NATS = 0.02  # bfloat16 against float32 stays below a hundredth


class MetricsLog:
    """Appends records to ``metrics.jsonl``. Each record has a ``kind``: one of ``RECORD_KINDS``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write metrics to {path}", got=error.strerror) from error

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write one record as one line; numbers that JSON lacks become null."""
        self._file.write(json.dumps({"kind": kind, **make_strict_json(dict(record))}, allow_nan=False) + "\n")
        self._file.flush()

    def kept(self) -> int:
        """Flush the run log to disk and return its length in bytes, which a checkpoint stores for a resume."""
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
    """Read the records of a run log, or of its first ``end`` bytes.

    An incomplete last line (of a killed run) is left out; any other unreadable line is an error.
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
                "the file is not a run log", where=f"{path}:{number}", got=line[:80],
                expected='an object with "kind" on every line',
            )  # fmt: skip
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


def drop_timings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drop seconds (``*_s``) and traffic from a record; the rest is the same in a repeated or resumed run."""
    return {key: value for key, value in record.items() if not key.endswith("_s") and key not in TRAFFIC}


def make_strict_json(value: Any) -> Any:
    """Replace every non-finite number by None, at any depth, as strict JSON needs it."""
    if isinstance(value, dict):
        return {key: make_strict_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [make_strict_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def find_alarms(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Find the alarms that the last step record triggers; the records before it are the run so far.

    On-policy distillation can fail unnoticed through length: a student that stops ending its answers still lowers its
    divergence token by token. Each alarm is raised once, when its condition begins to hold.
    """
    before = {alarm["alarm"] for alarm in _find_standing(records[:-1])}
    return [alarm for alarm in _find_standing(records) if alarm["alarm"] not in before]


def _find_standing(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    mismatch = _mean([record for record in records if record.get("mismatch_kl") is not None][-1:], "mismatch_kl")
    if mismatch is not None and mismatch > MISMATCH_NATS:
        found.append({"alarm": "mismatch_kl", "value": mismatch, "limit": MISMATCH_NATS})
    cut = _mean(records[-WINDOW:], "truncation_rate")
    if len(records) >= WINDOW and cut is not None and cut >= TRUNCATED:
        found.append({"alarm": "truncation_rate", "value": cut, "limit": TRUNCATED})
    if len(records) < 2 * WINDOW:  # too few steps to compare
        return found
    for name, low, high in (("length_mean", 1 / LENGTH_FACTOR, LENGTH_FACTOR), ("eos_probability", EOS_FACTOR, None)):
        first, last = _mean(records[:WINDOW], name), _mean(records[-WINDOW:], name)
        if not first or last is None:
            continue
        if last < low * first:
            found.append({"alarm": name, "value": last, "limit": low * first})
        elif high is not None and last > high * first:
            found.append({"alarm": name, "value": last, "limit": high * first})
    return found


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(record[name]) for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None
