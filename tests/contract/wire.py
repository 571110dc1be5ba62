"""Requests as a client writes them by hand, and the few readings of a reply that every test needs."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from tests.contract.servers import Endpoint

SCORE = {"max_tokens": 1, "temperature": 0, "return_token_ids": True}


def token_ids(n: int, *, seed: int = 0, vocab: int = 2048) -> list[int]:
    """n ids of ordinary tokens (the special ones come first in the test vocabulary)."""
    return [int(i) for i in np.random.default_rng(seed).integers(8, vocab, n)]


def post(server: Endpoint, path: str, body: dict[str, Any] | None, **options: Any) -> httpx.Response:
    with server.http(**options) as http:
        return http.post(path, json=body)


def get(server: Endpoint, path: str) -> httpx.Response:
    with server.http() as http:
        return http.get(path)


def is_at_least(server: Endpoint, minor: int) -> bool:
    """Whether the server is vLLM 0.``minor`` or newer, by its ``/version``."""
    major, is_minor = get(server, "/version").json()["version"].split(".")[:2]
    return (int(major), int(is_minor)) >= (0, minor)


def running(server: Endpoint) -> float:
    """How many requests the server works on."""
    lines = get(server, "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running"))


def until_busy(server: Endpoint, over: Callable[[], bool] = lambda: False) -> None:
    """Waits until the server works on a request, or the request is ``over`` already."""
    end = time.monotonic() + 240
    while not running(server) and not over():
        assert time.monotonic() < end, "nothing began"
        time.sleep(0.01)


def complete(server: Endpoint, prompt: object, **fields: Any) -> list[dict[str, Any]]:
    """The choices of ``/v1/completions``, in the order of their index."""
    reply = post(server, "/v1/completions", {"model": server.model, "prompt": prompt} | fields)
    assert reply.status_code == 200, reply.text
    return sorted(reply.json()["choices"], key=lambda choice: choice["index"])


def generate(server: Endpoint, ids: Sequence[int], **sampling: Any) -> dict[str, Any]:
    """The body of ``/inference/v1/generate``."""
    body = {"model": server.model, "token_ids": list(ids), "sampling_params": {"max_tokens": 1, **sampling}}
    reply = post(server, "/inference/v1/generate", body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def refused(server: Endpoint, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The ``error`` object of a request that must be answered with a 4xx in vLLM's envelope."""
    reply = post(server, path, body)
    assert 400 <= reply.status_code < 500, f"{reply.status_code}: {reply.text[:500]}"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == reply.status_code
    return dict(error)


def array(text: str) -> NDArray[np.float32]:
    """The matrix inside a base64 .npy field."""
    return np.asarray(np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False))
