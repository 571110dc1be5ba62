"""Prompt logprobs and candidates against the model's own float64 log-softmax."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.applications import Starlette

from tests.serve.apps import NAME, client, complete, exact_logp, generate, make_app, random_ids
from topkd.serve.model import backbone

TOLERANCE = 1e-4  # float32 against float64; these models have logits of +-30


def _matrix(body: dict) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(body["prompt_token_id_logprobs"])))


def _check_rows(rows: list, ids: list[int], exact: np.ndarray, k: int, tolerance: float = TOLERANCE) -> None:
    assert rows[0] is None
    assert len(rows) == len(ids)
    for position, row in enumerate(rows[1:], start=1):
        truth = exact[position - 1]
        listed = [int(key) for key in row]
        assert listed[0] == ids[position], "the realised token comes first"
        entries = list(row.values())
        rank = 1 + (truth > truth[ids[position]]).sum()
        assert entries[0]["rank"] == rank
        best = np.argsort(-truth, kind="stable")[:k].tolist()
        assert set(listed[1:]) | set(listed[:1]) == set(best) | {ids[position]}
        assert listed[1:] == [token for token in best if token != ids[position]], "by rank"
        for token, entry in zip(listed, entries, strict=True):
            assert abs(entry["logprob"] - truth[token]) < tolerance
            assert entry["rank"] == 1 + (truth > truth[token]).sum()


@pytest.mark.parametrize(("length", "k"), [(1, 3), (2, 1), (3, 0), (17, 20), (40, 256)])
async def test_prompt_logprobs_are_the_models_own(app: Starlette, models: Path, length: int, k: int):
    ids = random_ids(length, seed=length)
    [choice] = await complete(app, ids, prompt_logprobs=k)
    _check_rows(choice["prompt_logprobs"], ids, exact_logp(models / "policy", ids), k)


@pytest.mark.parametrize("rows_in_a_chunk", [1, 7, 8])
async def test_a_prompt_that_crosses_chunks_is_scored_like_any_other(
    app: Starlette, models: Path, rows_in_a_chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backbone, "CHUNK_ELEMENTS", 2048 * rows_in_a_chunk)
    ids, other = random_ids(33, seed=1), random_ids(30, seed=2)
    exact = exact_logp(models / "policy", ids)
    choices = await complete(app, [ids, other], prompt_logprobs=5)
    _check_rows(choices[0]["prompt_logprobs"], ids, exact, 5)
    _check_rows(choices[1]["prompt_logprobs"], other, exact_logp(models / "policy", other), 5)
    asked = np.random.default_rng(3).integers(0, 2048, (20, 4))
    body = await generate(app, ids, prompt_logprob_token_ids=asked.tolist(), prompt_logprob_start=12)
    np.testing.assert_allclose(_matrix(body), np.take_along_axis(exact[12:-1], asked, 1), rtol=0, atol=TOLERANCE)


async def test_a_long_prompt_never_holds_more_logits_than_one_chunk(app: Starlette, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backbone, "CHUNK_ELEMENTS", 2048 * 64)
    engine, seen = app.state.served.engine, []
    logits = engine.backbone.logits
    monkeypatch.setattr(engine.backbone, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    [choice] = await complete(app, random_ids(1500), prompt_logprobs=2)
    assert len(choice["prompt_logprobs"]) == 1500
    assert max(seen) == 64
    assert sum(seen) == 1499 + 1


async def test_a_tied_padded_llama_is_scored_over_its_own_vocabulary(models: Path):
    app = make_app(models / "llama", max_logprobs=-1)
    ids = random_ids(9, seed=5)
    [choice] = await complete(app, ids, prompt_logprobs=-1)
    assert len(choice["prompt_logprobs"][1]) == 2176, "the logits are wider than the tokenizer"
    exact = exact_logp(models / "llama", ids)
    for position, row in enumerate(choice["prompt_logprobs"][1:], start=1):
        got = np.array([row[str(token)]["logprob"] for token in range(2176)])
        np.testing.assert_allclose(got, exact[position - 1], rtol=0, atol=TOLERANCE)
    app.state.served.engine.stop()


async def test_candidates_and_lists_of_one_batch_do_not_mix(app: Starlette, models: Path):
    """Jobs with different K, different candidates and none at all share one forward pass."""
    prompts = [random_ids(n, seed=n) for n in (9, 10, 11, 12)]
    asked = [np.random.default_rng(i).integers(0, 2048, (len(ids) - 1, i + 1)) for i, ids in enumerate(prompts)]
    bodies = await asyncio.gather(
        generate(app, prompts[0], prompt_logprob_token_ids=asked[0].tolist()),
        generate(app, prompts[1], prompt_logprobs=2, prompt_logprob_token_ids=asked[1].tolist()),
        generate(app, prompts[2], prompt_logprobs=7),
        generate(app, prompts[3]),
    )
    for index in (0, 1):
        exact = exact_logp(models / "policy", prompts[index])
        want = np.take_along_axis(exact[:-1], asked[index], 1)
        np.testing.assert_allclose(_matrix(bodies[index]), want, rtol=0, atol=TOLERANCE)
    _check_rows(bodies[1]["prompt_logprobs"], prompts[1], exact_logp(models / "policy", prompts[1]), 2)
    _check_rows(bodies[2]["prompt_logprobs"], prompts[2], exact_logp(models / "policy", prompts[2]), 7)
    assert bodies[3]["prompt_logprobs"] is bodies[3]["prompt_token_id_logprobs"] is None


@pytest.fixture
def broken(models: Path) -> Iterator[Starlette]:
    """A model that gives NaN after token 99, and minus infinity for token 5 everywhere."""
    app = make_app(models / "policy")
    served = app.state.served
    with torch.no_grad():
        served.model.model.embed_tokens.weight[99] = float("nan")
    logits = served.engine.backbone.logits

    def holed(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        out[:, 5] = -torch.inf
        return out

    served.engine.backbone.logits = holed
    yield app
    served.engine.stop()


async def test_nan_is_an_error_of_its_own_request_and_never_a_number(broken: Starlette):
    async with client(broken) as http:
        replies = await asyncio.gather(
            *(
                http.post("/v1/completions", json={"model": NAME, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 1})
                for ids in ([9, 99, 11, 12], [9, 10, 11, 12])
            )
        )
    assert [reply.status_code for reply in replies] == [500, 200]
    assert "not JSON compliant" in replies[0].json()["error"]["message"]


async def test_probability_zero_is_minus_9999_in_json_and_minus_infinity_in_the_matrix(broken: Starlette):
    body = await generate(broken, [9, 5, 11], prompt_logprobs=1, prompt_logprob_token_ids=[[5], [11]])
    assert body["prompt_logprobs"][1]["5"]["logprob"] == -9999.0
    assert np.isneginf(_matrix(body)[0, 0])
    assert np.isfinite(_matrix(body)[1, 0])
