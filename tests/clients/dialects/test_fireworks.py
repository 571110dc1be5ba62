"""Fireworks' echo, from its SDK's types: five entries a row, ids, and a full echo whose first row is nobody's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.toy import VOCAB, Toy, Wire
from topkd.clients.config import ClientConfig
from topkd.clients.dialects.fireworks import ROUTE, FireworksEcho
from topkd.topk.errors import AlignmentError, ConfigError, KLimitError, ResponseError
from topkd.topk.samples import SamplingParams

TOY = Toy(seed=7)
FAST = ClientConfig(backoff_s=0.0, max_retries=0, response_retries=0)
IDS = np.random.default_rng(8).integers(0, VOCAB, 11).tolist()


def position(row: np.ndarray, token: int, k: int) -> dict[str, Any]:
    top = [{"token": "x", "token_id": t, "logprob": lp} for t, lp in TOY.top(row, k)]
    return {"token": "x", "token_id": token, "logprob": float(row[token]), "sampling_logprob": 0.0, "top_logprobs": top}


def server(*, whole: bool = False, change: Any = None) -> Wire:
    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        assert (method, path) == ("POST", ROUTE)
        ids, k = body["prompt"], body["top_logprobs"]
        if body.get("echo"):
            content = [position(row, t, k) for row, t in zip(TOY.rows(ids), ids[1:], strict=True)]
            unconditional = position(TOY.logp[0], ids[0], k)
            content = [unconditional, *content] if whole else content[-body["echo_last"] :]
        else:
            drawn = TOY.draw(ids, body["max_tokens"], seed=body["seed"])
            content = [position(TOY.logp[b], t, k) for b, t in zip([ids[-1], *drawn], drawn, strict=False)]
        if change:
            change(content)
        return 200, {"choices": [{"index": 0, "logprobs": {"content": content}, "finish_reason": "length"}]}

    return Wire(handler)


def client(wire: Wire, **options: Any) -> FireworksEcho:
    return FireworksEcho(
        "https://h", **{"model": "m", "config": FAST, "transport": wire, "vocab_size": VOCAB} | options
    )


@pytest.mark.parametrize("whole", [False, True])
async def test_the_echo_is_the_models_own_rows_with_or_without_the_unconditional_first(whole: bool):
    wire = server(whole=whole)
    scores = await client(wire).score(IDS, 4, 5)
    rows = TOY.rows(IDS)[4:]
    np.testing.assert_allclose(scores.actual_logp, rows[np.arange(len(rows)), IDS[5:]], atol=1e-6)
    np.testing.assert_array_equal(scores.ids, [[t for t, _ in TOY.top(row, 5)] for row in rows])
    [body] = wire.bodies(ROUTE)
    assert body["context_length_exceeded_behavior"] == "error", "the default cuts a long prompt without a word"
    assert (body["max_tokens"], body["echo_last"]) == (0, len(IDS) - 5)


async def test_k_above_five_is_refused_here_with_the_limit():
    for call in (client(server()).score(IDS, 0, 6), client(server()).sample(IDS, 1, SamplingParams(2), k=6)):
        with pytest.raises(KLimitError) as caught:
            await call
        assert caught.value.limit == 5


async def test_draws_are_exact_and_listed():
    [rollout] = await client(server()).sample(IDS, 1, SamplingParams(6, seed=3), k=3)
    rows = TOY.rows([*IDS, *rollout.completion_ids])[len(IDS) - 1 :]
    np.testing.assert_allclose(rollout.logp, rows[np.arange(6), rollout.completion_ids], atol=1e-6)
    assert rollout.topk is not None
    np.testing.assert_allclose(rollout.topk.logp, -np.sort(-rows, axis=1)[:, :3], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda content: content.pop(), AlignmentError),
        (lambda content: content[2].__setitem__("token_id", (content[2]["token_id"] + 1) % VOCAB), AlignmentError),
        (lambda content: content[1].__setitem__("logprob", None), ResponseError),
        (lambda content: content[1]["top_logprobs"].pop(), ResponseError),
        (lambda content: content[1]["top_logprobs"][0].__setitem__("token_id", VOCAB), ResponseError),
        (lambda content: [entry.__setitem__("top_logprobs", []) for entry in content], ResponseError),
    ],
)
async def test_a_broken_echo_is_refused(change: Any, error: Any):
    with pytest.raises(error):
        await client(server(change=change)).score(IDS, 0, 5)


async def test_a_model_must_be_named():
    with pytest.raises(ConfigError, match="model"):
        await client(server(), model=None).score(IDS, 0, 5)
