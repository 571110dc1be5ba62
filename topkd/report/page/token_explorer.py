"""Recorded rollouts for the page: checked, limited to a budget that the page states, each as one JSON text.

The texts in ``tokens.jsonl`` come from models. They are not trusted, and the page shows them only as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from topkd.report.load.collection import RunGroup
from topkd.report.load.run_log import LISTED, Record, StoredRollout

BUDGET_CHARS: Final = 5_000_000  # for all rollouts on a page together


@dataclass(frozen=True, slots=True)
class TranscriptFile:
    """The rollouts of a page: heads for the menu, bodies in the same order, and a note on what was left out."""

    heads: list[dict[str, Any]]
    bodies: list[str]
    note: str


def select_transcripts(groups: Sequence[RunGroup], budget: int = BUDGET_CHARS) -> TranscriptFile:
    """Select as many rollouts as the budget allows, evenly from all runs, and from early to late in each."""
    recorded = [
        (index, run, rollout) for index, group in enumerate(groups) for run in group.runs for rollout in run.rollouts
    ]
    sizes = [_estimate_size(rollout) for _, _, rollout in recorded]
    chosen = _choose_within(sizes, budget)
    several = len({id(run) for _, run, _ in recorded}) > 1
    heads, bodies = [], []
    for number in chosen:
        index, run, rollout = recorded[number]
        record = rollout.read()
        label, count = _write_label(record, run.name if several else ""), len(record["tokens"])
        heads.append({"g": index, "label": label, "step": record.get("step"), "n": count})
        bodies.append(json.dumps(build_body(record), allow_nan=False, ensure_ascii=False, separators=(",", ":")))
    left = len(recorded) - len(chosen)
    note = f"{len(chosen)} of {len(recorded)} recorded rollouts are on this page; tokens.jsonl has all." if left else ""
    return TranscriptFile(heads, bodies, note)


def build_body(record: Record) -> dict[str, Any]:
    """Build a rollout with short keys: b, s and t are the rollout's, student's and teacher's logprobs of a token."""
    texts = record.get("texts")
    texts = texts if isinstance(texts, dict) else {}
    tokens = [token for token in record["tokens"] if isinstance(token, dict)]
    shown = [_build_token(token) for token in tokens]
    used = {str(entry[0]) for token in shown for side in ("T", "S") for entry in token[side] or ()}
    return {
        "prompt": str(record.get("prompt", "")),
        "step": record.get("step"),
        "sample": str(record.get("sample_id", "")),
        "objective": str(record.get("objective", "")),
        "divergence": str(record.get("divergence", "")),
        "cut": record.get("left_out") or 0,
        "finish": str(record.get("finish_reason", "")),
        "texts": {key: str(text) for key, text in texts.items() if key in used},
        "tokens": shown,
    }


def _build_token(token: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": token.get("id"),
        "text": str(token.get("text", "")),
        "b": _number(token.get("behavior_logp")),
        "s": _number(token.get("student_logp")),
        "t": _number(token.get("teacher_logp")),
        "a": _number(token.get("advantage")),
        "d": _number(token.get("divergence")),
        "m": token.get("trains") is not False,
        "T": _build_list(token.get("teacher")),
        "S": _build_list(token.get("student")),
    }


def _build_list(entries: Any) -> list[list[Any]] | None:
    if not isinstance(entries, list):
        return None
    pairs = [entry for entry in entries if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int)]
    return [[entry[0], _number(entry[1])] for entry in pairs[:LISTED]]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _write_label(record: Record, run: str) -> str:
    parts = [run, f"step {record.get('step', '?')}", str(record.get("sample_id") or "")]
    return " · ".join(part for part in parts if part)


def _estimate_size(rollout: StoredRollout) -> int:
    """Estimate the number of characters of a rollout on the page."""
    return 400 + 110 * rollout.tokens + 30 * rollout.entries


def _choose_within(sizes: Sequence[int], budget: int) -> list[int]:
    """Choose evenly spaced indices whose sizes together are within the budget; all of them if they fit."""
    count = len(sizes)
    while count > 0:
        step = len(sizes) / count
        chosen = sorted({min(len(sizes) - 1, int(step * (i + 0.5))) for i in range(count)})
        if sum(sizes[index] for index in chosen) <= budget:
            return chosen
        count = count * 9 // 10
    return []
