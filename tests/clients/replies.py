"""Scoring replies as vLLM writes them, with token strings chosen to mislead a byte-level reader."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

HOSTILE = [
    " the", '"', "\\", "\n", "{", "}", '}},{"', '":{"logprob":', '"prompt_logprobs":[', "é", "�", "日本", "<|im_end|>",
    "[null,", "\t", " 12", "😀", ',"rank":', "null", "]", "}}]", '\\"',
]  # fmt: skip


def score_rows(
    length: int, k: int, *, seed: int = 0, vocab: int = 151_936, extra: float = 0.3
) -> tuple[np.ndarray, list[dict[int, tuple[float, int]] | None]]:
    """Prompt ids, and for each position {id: (logprob, rank)} with the realised token first."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, length).astype(np.int32)
    rows: list[dict[int, tuple[float, int]] | None] = [None]
    for position in range(1, length):
        actual = int(ids[position])
        spread = rng.choice([0.02, 0.2, 2.0])
        p = rng.dirichlet(np.full(k + 2, spread)) + 1e-9
        logp = np.sort(np.log(p / p.sum())[: k + 1].astype(np.float32))[::-1]
        others = [int(t) for t in rng.choice(vocab, min(k + 2, vocab), replace=False) if t != actual][:k]
        row: dict[int, tuple[float, int]] = {}
        if rng.random() < extra:
            row[actual] = (
                float(np.float32(logp[k - 1] - rng.random() * 5 if k else -3.0)),
                k + 1 + int(rng.integers(900)),
            )
        else:
            place = int(rng.integers(k))
            others[place] = actual
            row[actual] = (float(logp[place]), place + 1)
        for rank, token in enumerate(others, 1):
            row[token] = (float(logp[rank - 1]), rank)
        rows.append(row)
    return ids, rows


def score_body(ids: np.ndarray, rows: list[dict[int, tuple[float, int]] | None], **choice: Any) -> bytes:
    """The JSON of ``/v1/completions``, compact, as the server writes it."""
    served = [
        None
        if row is None
        else {
            str(t): {"logprob": logp, "rank": rank, "decoded_token": HOSTILE[t % len(HOSTILE)]}
            for t, (logp, rank) in row.items()
        }
        for row in rows
    ]
    body = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "t",
        "choices": [
            {
                "index": 0,
                "text": '"prompt_logprobs":[',
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": [5],
                "prompt_logprobs": served,
                "prompt_token_ids": ids.tolist(),
                **choice,
            }
        ],
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1},
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def score_reply(length: int, k: int, **options: Any) -> tuple[bytes, np.ndarray]:
    """A whole reply and its prompt."""
    ids, rows = score_rows(length, k, **options)
    return score_body(ids, rows), ids
