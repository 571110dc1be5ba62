"""Embedded servers inside the test process, and the model's own numbers in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from starlette.applications import Starlette

from topkd.serve import ServeConfig, create_app, load_model

NAME = "tiny"


def make_app(model: Path, **options: Any) -> Starlette:
    config = ServeConfig(
        model=str(model),
        **{"served_model_name": NAME, "max_logprobs": 256, "max_model_len": 4096, "device": "cpu", **options},
    )
    return create_app(*load_model(config), config)


def client(app: Starlette, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://embedded", timeout=240, **options)


async def post(app: Starlette, path: str, body: object, **options: Any) -> dict[str, Any]:
    async with client(app) as http:
        reply = await http.post(path, json=body, **options)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def complete(app: Starlette, prompt: object, **fields: Any) -> list[dict[str, Any]]:
    body = await post(app, "/v1/completions", {"model": NAME, "prompt": prompt, "max_tokens": 1, **fields})
    return list(body["choices"])


async def generate(app: Starlette, ids: Sequence[int], **sampling: Any) -> dict[str, Any]:
    fields = {"model": NAME, "token_ids": list(ids), "sampling_params": {"max_tokens": 1, **sampling}}
    return await post(app, "/inference/v1/generate", fields)


@lru_cache(maxsize=8)
def _exact_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def exact_logp(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """float64 [T, V]: row i predicts token i + 1, from one plain forward pass of the whole model."""
    logits = _exact_model(folder)(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.log_softmax(-1).numpy()


def random_ids(n: int, *, seed: int = 0, vocab: int = 2048) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(8, vocab, n)]
