"""A language model small enough to know by heart, and servers that speak for it in every dialect.

The next token's distribution depends on the present token only, so that every logprob of every reply can be checked
against ``Toy.rows``, and a server can be made to lie in one exact way.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from topkd.clients.http.transport import Reply, Request

VOCAB = 120


class Toy:
    """log p(next | present) as one table."""

    def __init__(self, seed: int = 0, scale: float = 2.0) -> None:
        logits = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * scale
        self.logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def rows(self, ids: Any) -> np.ndarray:
        """float64 [len(ids) - 1, V]: row i predicts ids[i + 1]."""
        return self.logp[np.asarray(ids)[:-1]]

    def top(self, row: np.ndarray, k: int) -> list[tuple[int, float]]:
        order = np.lexsort((np.arange(VOCAB), -row))[:k]
        return [(int(t), float(row[t])) for t in order]

    def draw(self, prompt: list[int], count: int, *, temperature: float = 1.0, seed: int = 0) -> list[int]:
        rng, ids = np.random.default_rng(seed), list(prompt)
        for _ in range(count):
            row = self.logp[ids[-1]]
            if temperature == 0:
                ids.append(int(row.argmax()))
                continue
            p = np.exp(row / temperature)
            ids.append(int(rng.choice(VOCAB, p=p / p.sum())))
        return ids[len(prompt) :]


class Wire:
    """A transport in front of ``handler(method, path, body) -> (status, value)``; it remembers what it was sent."""

    def __init__(self, handler: Callable[[str, str, Any], tuple[int, Any]]) -> None:
        self.handler, self.seen = handler, []

    async def send(self, request: Request) -> Reply:
        path = request.url.split("://", 1)[1].partition("/")[2]
        body = json.loads(request.content) if request.content else None
        self.seen.append((request.method, f"/{path}", body))
        status, value = self.handler(request.method, f"/{path}", body)
        return Reply(status, {}, value if isinstance(value, bytes) else json.dumps(value).encode(), request.url)

    async def aclose(self) -> None:
        pass

    def bodies(self, path: str) -> list[Any]:
        return [body for _, seen, body in self.seen if seen == path]


def scripted(*values: Any) -> Wire:
    """Answers in turn; an extra request fails, but for the question of weights that no reply names."""
    queue = list(values)

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if (method, path) == ("GET", "/weight_info"):  # not mounted
            return 404, {"detail": "Not Found"}
        assert queue, f"an extra request: {method} {path} {body}"
        value = queue.pop(0)
        return value if isinstance(value, tuple) else (200, value)

    return Wire(handler)


def npy(matrix: np.ndarray) -> str:
    """base64 of a .npy file, as vLLM sends candidates."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(matrix, dtype=np.float32))
    return base64.b64encode(buffer.getvalue()).decode()


def refused(message: str, status: int = 400) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
