"""Alarms from a run's own step records: completions that never end, or that shrink away.

On-policy distillation fails quietly through length: a student that stops ending its answers still lowers its divergence
token by token. Each alarm sounds once, when its condition begins to hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]

WINDOW = 5  # steps that are averaged: one step's completions differ by chance
TRUNCATED = 0.5  # share of completions cut at the limit
LENGTH_FACTOR = 2.0  # against the first steps of the run
EOS_FACTOR = 0.1
MISMATCH_NATS = 0.02  # bfloat16 against float32 stays below a hundredth


def find_alarms(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The alarms that the last of these step records sets off; the ones before it are the run so far."""
    before = {alarm["alarm"] for alarm in _is_standing(records[:-1])}
    return [alarm for alarm in _is_standing(records) if alarm["alarm"] not in before]


def _is_standing(records: Sequence[Record]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    mismatch = _mean([record for record in records if record.get("mismatch_kl") is not None][-1:], "mismatch_kl")
    if mismatch is not None and mismatch > MISMATCH_NATS:
        found.append({"alarm": "mismatch_kl", "value": mismatch, "limit": MISMATCH_NATS})
    cut = _mean(records[-WINDOW:], "truncation_rate")
    if len(records) >= WINDOW and cut is not None and cut >= TRUNCATED:
        found.append({"alarm": "truncation_rate", "value": cut, "limit": TRUNCATED})
    if len(records) < 2 * WINDOW:  # too short a run to have changed
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


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [float(record[name]) for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None
