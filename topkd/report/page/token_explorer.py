"""Recorded rollouts as the page shows them: checked, cut to a budget that is said aloud, one JSON text each.

What stands in ``tokens.jsonl`` came out of models: every text in it is untrusted, and stays text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from topkd.report.load.collection import RunGroup
from topkd.report.load.run_log import LISTED, Record, StoredRollout

BUDGET_CHARS: Final = 5_000_000  # of all rollouts on a page together


@dataclass(frozen=True, slots=True)
class TranscriptFile:
    """The rollouts of a page: heads for the menu, bodies by place, and what was left out."""

    heads: list[dict[str, Any]]
    bodies: list[str]
    note: str


def select_transcripts(groups: Sequence[RunGroup], budget: int = BUDGET_CHARS) -> TranscriptFile:
    """Select as many rollouts as the budget holds, evenly from all runs and from early to late in each."""
    places = [
        (index, run, rollout) for index, group in enumerate(groups) for run in group.runs for rollout in run.rollouts
    ]
    sizes = [_estimate_size(rollout) for _, _, rollout in places]
    chosen = _choose_within(sizes, budget)
    several = len({id(run) for _, run, _ in places}) > 1
    heads, bodies = [], []
    for place in chosen:
        index, run, rollout = places[place]
        record = rollout.read()
        label, count = _write_label(record, run.name if several else ""), len(record["tokens"])
        heads.append({"g": index, "label": label, "step": record.get("step"), "n": count})
        bodies.append(json.dumps(build_body(record), allow_nan=False, ensure_ascii=False, separators=(",", ":")))
    left = len(places) - len(chosen)
    note = f"{len(chosen)} of {len(places)} recorded rollouts are on this page; tokens.jsonl has all." if left else ""
    return TranscriptFile(heads, bodies, note)


def build_body(record: Record) -> dict[str, Any]:
    """Build a rollout in short keys: b, s, t are the rollout's, student's and teacher's logprob of its token."""
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
    """Estimate how many characters a rollout takes on the page."""
    return 400 + 110 * rollout.tokens + 30 * rollout.entries


def _choose_within(sizes: Sequence[int], budget: int) -> list[int]:
    """Choose evenly spaced indices whose sizes together stay within the budget: all of them where they fit."""
    count = len(sizes)
    while count > 0:
        step = len(sizes) / count
        chosen = sorted({min(len(sizes) - 1, int(step * (i + 0.5))) for i in range(count)})
        if sum(sizes[place] for place in chosen) <= budget:
            return chosen
        count = count * 9 // 10
    return []
