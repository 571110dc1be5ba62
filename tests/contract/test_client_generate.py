"""The tokens-in-tokens-out client against both servers: the same rows as completions, candidates in both schemas."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import token_ids
from topkd.clients import ClientConfig, VllmCompletions
from topkd.clients.dialects.vllm_generate import VllmGenerate
from topkd.topk.errors import (
    AuthError,
    ContextLimitError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    UnsupportedError,
)
from topkd.topk.samples import SamplingParams

TOLERANCE = 1e-4
QUICK = ClientConfig(max_retries=1, backoff_s=0.05, connect_timeout_s=60.0)


@pytest.fixture
async def client(server: Endpoint) -> AsyncIterator[VllmGenerate]:
    async with VllmGenerate(server.url, api_key=server.api_key, config=QUICK, vocab_size=2048) as up:
        yield up


@pytest.fixture
async def chooser(guarded: Endpoint) -> AsyncIterator[VllmGenerate]:
    async with VllmGenerate(guarded.url, api_key=guarded.api_key, config=QUICK, vocab_size=2048) as up:
        yield up


@pytest.mark.parametrize(("length", "start", "k"), [(17, 0, 20), (2, 0, 1), (300, 299 - 64, 64)])
async def test_a_score_is_the_float64_distribution_and_the_completions_score(
    server: Endpoint, client: VllmGenerate, length: int, start: int, k: int
):
    ids = token_ids(length, seed=700 + length)
    rows = await client.score(ids, start, k)
    exact = logp_rows(server.model_dir, ids)[start:-1]
    np.testing.assert_allclose(rows.logp, -np.sort(-exact, axis=1)[:, :k], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows.logp, np.take_along_axis(exact, rows.ids, axis=1), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows.actual_logp, exact[np.arange(rows.rows), rows.actual_ids], rtol=0, atol=TOLERANCE)
    async with VllmCompletions(server.url, api_key=server.api_key, config=QUICK) as other:
        same = await other.score(ids, start, k)
    assert (rows.start, rows.rows, rows.k) == (same.start, same.rows, same.k)
    np.testing.assert_allclose(rows.logp, same.logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows.actual_logp, same.actual_logp, rtol=0, atol=1e-5)


async def test_rollouts_are_exact_with_a_whole_list_and_the_weights_version(server: Endpoint, client: VllmGenerate):
    prompt, k = token_ids(10, seed=711), 5
    drawn = await client.sample(prompt, 3, SamplingParams(max_tokens=24, seed=5), k=k)
    outside = 0
    for rollout in drawn:
        exact = logp_rows(server.model_dir, prompt + rollout.completion_ids.tolist())[len(prompt) - 1 : -1]
        realised = exact[np.arange(len(exact)), rollout.completion_ids]
        np.testing.assert_allclose(rollout.logp, realised, rtol=0, atol=TOLERANCE)
        assert rollout.topk is not None
        np.testing.assert_allclose(rollout.topk.logp, -np.sort(-exact, axis=1)[:, :k], rtol=0, atol=TOLERANCE)
        outside += int((rollout.logp < rollout.topk.logp[:, -1]).sum())
        assert rollout.version == "default"
    assert outside, "the draw must show a token outside the list: its K-th entry is what the server cuts"


async def test_errors_are_those_of_the_completions_client(server: Endpoint, client: VllmGenerate):
    with pytest.raises(KLimitError) as caught:
        await client.score(token_ids(5), 0, server.max_logprobs + 1)
    assert caught.value.limit == server.max_logprobs
    for extra in (0, 1):
        ids = token_ids(server.max_model_len + extra)
        with pytest.raises(ContextLimitError):
            await client.score(ids, len(ids) - 10, 2)
        with pytest.raises(ContextLimitError):
            await client.sample(ids, 1, SamplingParams(max_tokens=1))
    async with VllmGenerate(server.url, model="nobody", api_key=server.api_key, config=QUICK) as stranger:
        with pytest.raises(ModelNotFoundError, match="nobody"):
            await stranger.score(token_ids(5), 0, 2)
    async with VllmGenerate(server.url, api_key=server.api_key, config=QUICK) as blind:
        with pytest.raises(RequestRefusedError, match="5000"):
            await blind.score([9, 10, 5000], 0, 2)


@pytest.mark.parametrize(("length", "start", "k"), [(9, 0, 3), (17, 12, 64), (2, 0, 1)])
async def test_candidates_are_the_float64_logprobs_in_the_order_asked(
    guarded: Endpoint, chooser: VllmGenerate, length: int, start: int, k: int
):
    rng = np.random.default_rng(length)
    ids = token_ids(length, seed=720 + length)
    wanted = np.stack([rng.choice(2048, k, replace=False) for _ in range(length - 1 - start)]).astype(np.int32)
    got = await chooser.score_candidates(ids, start, wanted)
    exact = np.take_along_axis(logp_rows(guarded.model_dir, ids)[start:-1], wanted, axis=1)
    np.testing.assert_allclose(got, exact, rtol=0, atol=TOLERANCE)


async def test_a_padded_candidate_is_minus_infinity(guarded: Endpoint, chooser: VllmGenerate):
    ids, wanted = token_ids(4, seed=730), np.array([[5, 9], [7, -1], [-1, -1]], dtype=np.int32)
    got = await chooser.score_candidates(ids, 0, wanted)
    assert np.isneginf(got).tolist() == (wanted < 0).tolist()
    assert got[1, 0] == pytest.approx(logp_rows(guarded.model_dir, ids)[1, 7], abs=TOLERANCE)


async def test_candidates_past_the_limit_or_the_vocabulary_are_typed_refusals(chooser: VllmGenerate, guarded: Endpoint):
    wide = np.tile(np.arange(3, 3 + guarded.max_logprobs + 1, dtype=np.int32), (4, 1))
    with pytest.raises(KLimitError) as caught:
        await chooser.score_candidates(token_ids(5), 0, wide)
    assert caught.value.limit == guarded.max_logprobs
    async with VllmGenerate(guarded.url, api_key=guarded.api_key, config=QUICK) as blind:
        with pytest.raises(RequestRefusedError, match="vocab"):
            await blind.score_candidates(token_ids(5), 0, np.full((4, 1), 2048, dtype=np.int32))
    async with VllmGenerate(guarded.url, model=guarded.model, config=QUICK) as stranger:
        with pytest.raises(AuthError):
            await stranger.score_candidates(token_ids(5), 0, np.full((4, 1), 5, dtype=np.int32))


@pytest.mark.vllm
@pytest.mark.slow
async def test_a_vllm_without_model_runner_v2_is_unsupported_not_a_mystery(vllm: Endpoint):
    async with VllmGenerate(vllm.url, config=QUICK) as up:
        with pytest.raises(UnsupportedError, match="V2 model runner"):
            await up.score_candidates(token_ids(5), 0, np.full((4, 1), 5, dtype=np.int32))
