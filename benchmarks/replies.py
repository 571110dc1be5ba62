"""Scoring replies for the client benchmarks: odd token strings, the realised token one more entry in 30 % of rows."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import numpy as np

TOKENS = [
    " the",
    '"',
    "\\",
    "\n",
    "{",
    "}",
    '}},{"',
    "é",
    "�",
    "日本",
    "<|im_end|>",
    " get",
    "[null,",
    "\t",
    " 12",
    "😀",
]


def score_reply(length: int, k: int, *, seed: int = 0, vocab: int = 151_936) -> tuple[bytes, np.ndarray]:
    """The bytes of a ``/v1/completions`` reply in vLLM's compact form, and its prompt ids."""
    rng = np.random.default_rng(seed)
    ids = np.array(prompt_ids(length, seed=seed, vocab=vocab))
    rows: list[dict[str, Any] | None] = [None]
    for actual in ids[1:].tolist():
        # Falls like the logprobs of a language model do, without ties; the mass of the list differs from row to row.
        steps = 1e-4 + rng.exponential(1.0, k + 1) * rng.choice([0.2, 1.0, 3.0]) / np.arange(1, k + 2) ** 0.7
        falling = -np.cumsum(steps)
        logp = (falling - np.log(np.exp(falling).sum()) - rng.exponential(0.03)).astype(np.float32)
        names = [int(t) for t in rng.choice(vocab, k + 1, replace=False) if t != actual][:k]
        row: dict[str, Any] = {}
        if rng.random() < 0.3:
            row[str(actual)] = _entry(
                actual, float(np.float32(logp[k - 1] - 5 * rng.random())), k + 1 + int(rng.integers(900))
            )
        else:
            place = int(rng.integers(k))
            names[place] = actual
            row[str(actual)] = _entry(actual, float(logp[place]), place + 1)
        for rank, token in enumerate(names, 1):
            row[str(token)] = _entry(token, float(logp[rank - 1]), rank)
        rows.append(row)
    choice = {
        "index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "stop_reason": None, "token_ids": [5],
        "prompt_logprobs": rows, "prompt_token_ids": ids.tolist(), "routed_experts": None,
    }  # fmt: skip
    usage = {"prompt_tokens": length, "total_tokens": length + 1, "completion_tokens": 1}
    body = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "t",
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode(), ids.astype(np.int32)


def prompt_ids(length: int, *, seed: int = 0, vocab: int = 151_936) -> list[int]:
    """The prompt that the reply of the same seed scores."""
    return [int(t) for t in np.random.default_rng(seed + 1).integers(0, vocab, length)]


def _entry(token: int, logp: float, rank: int) -> dict[str, Any]:
    return {"logprob": logp, "rank": rank, "decoded_token": TOKENS[token % len(TOKENS)]}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpu:  # noqa: PTH123 - a device file
            name = next((line.partition(":")[2].strip() for line in cpu if line.startswith("model name")), name)
    except OSError:
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.system(),
    }
