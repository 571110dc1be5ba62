"""Small builders shared by the tests of the maths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from topkd.topk import TopK

GOLDEN = Path(__file__).parents[1] / "golden"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def random_logp(rng: np.random.Generator, *shape: int, scale: float = 2.0) -> np.ndarray:
    return log_softmax(rng.normal(size=shape) * scale)


def topk_of(logp: np.ndarray, k: int, *, tail: bool = True, actual: np.ndarray | None = None) -> TopK:
    """The k most probable ids of dense float64 logprobs [R, V]."""
    order = np.argsort(-logp, axis=1, kind="stable")[:, :k]
    listed = np.take_along_axis(logp, order, axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(1.0 - np.exp(listed).sum(axis=1), 0.0))
    rows = np.arange(len(logp))
    return TopK(
        0,
        order.astype(np.int32),
        listed.astype(np.float32),
        np.full(len(logp), -1, dtype=np.int32) if actual is None else actual,
        np.full(len(logp), np.nan, dtype=np.float32) if actual is None else logp[rows, actual].astype(np.float32),
        rest.astype(np.float32) if tail else np.full(len(logp), np.nan, dtype=np.float32),
    )


def listed_at(logp: np.ndarray, ids: np.ndarray, actual: np.ndarray) -> TopK:
    """Exact teacher scores at chosen ids [R, K] (any order), float32-rounded as every ``TopK`` is."""
    at = np.take_along_axis(logp, ids, axis=1)
    order = np.argsort(-at, axis=1, kind="stable")
    at, ids = np.take_along_axis(at, order, axis=1), np.take_along_axis(ids, order, axis=1)
    rows = np.arange(len(logp))
    return TopK(
        0,
        ids.astype(np.int32),
        at.astype(np.float32),
        actual.astype(np.int32),
        logp[rows, actual].astype(np.float32),
        np.full(len(logp), np.nan, dtype=np.float32),
    )


def as_dict(scores: TopK, row: int) -> dict[int, float]:
    return {
        int(token): float(value) for token, value in zip(scores.ids[row], scores.logp[row], strict=True) if token >= 0
    }


def number(value: Any) -> float:
    """A golden's number: strict JSON writes nan and the infinities as strings, and null for masked."""
    return float("nan") if value is None else float(value)


def positions(lists: Any) -> list[list[tuple[int, float]]]:
    return [[(int(token), number(value)) for token, value in position] for position in lists]


def cases(name: str) -> list[dict[str, Any]]:
    """Cases of a golden .npz, each with its arrays under "i" (inputs) and "e" (expected)."""
    with np.load(GOLDEN / name) as archive:
        meta = json.loads(bytes(archive["_meta"]))
        return [
            {
                **case,
                "i": {key: archive[f"{case['id']:03d}.i.{key}"] for key in case["inputs"]},
                "e": {key: archive[f"{case['id']:03d}.e.{key}"] for key in case["expected"]},
            }
            for case in meta["cases"]
        ]


def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))
