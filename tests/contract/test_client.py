"""The vLLM client against both servers: checked rows, exact rollouts, typed errors, and a server that dies under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from tests.contract.conftest import API_KEY
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import get, post, running, token_ids, until_busy
from topkd.clients import ClientConfig, VllmCompletions, VllmGenerate, connect
from topkd.topk.errors import (
    AuthError,
    ContextLimitError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ServerPausedError,
    ServerUnreachableError,
)
from topkd.topk.samples import SamplingParams

TOLERANCE = 1e-4
QUICK = ClientConfig(max_retries=1, backoff_s=0.05, connect_timeout_s=60.0)


@pytest.fixture
async def client(server: Endpoint) -> AsyncIterator[VllmCompletions]:
    async with VllmCompletions(server.url, api_key=server.api_key, config=QUICK, vocab_size=2048) as up:
        yield up


@pytest.mark.parametrize(("length", "start", "k"), [(17, 0, 20), (40, 30, 5), (2, 0, 1), (300, 299 - 64, 64)])
async def test_a_score_is_the_float64_distribution_row_by_row(
    server: Endpoint, client: VllmCompletions, length: int, start: int, k: int
):
    ids = token_ids(length, seed=500 + length)
    rows = await client.score(ids, start, k)
    exact = logp_rows(server.model_dir, ids)[start:-1]
    assert (rows.start, rows.rows, rows.k) == (start, length - 1 - start, k)
    assert rows.actual_ids.tolist() == ids[start + 1 :]
    np.testing.assert_allclose(rows.actual_logp, exact[np.arange(rows.rows), rows.actual_ids], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows.logp, np.take_along_axis(exact, rows.ids, axis=1), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows.logp, -np.sort(-exact, axis=1)[:, :k], rtol=0, atol=TOLERANCE)
    tail = 1.0 - np.exp(np.take_along_axis(exact, rows.ids, axis=1)).sum(axis=1)
    np.testing.assert_allclose(np.exp(rows.tail_logp, dtype=np.float64), tail, rtol=0, atol=TOLERANCE)


async def test_a_narrower_score_is_the_slice_of_a_wider_one(client: VllmCompletions):
    ids = token_ids(25, seed=510)
    wide, narrow = await client.score(ids, 3, 32), await client.score(ids, 9, 4)
    cut = wide.slice(slice(6, None), k=4)
    assert cut.start == narrow.start
    np.testing.assert_array_equal(cut.ids, narrow.ids)
    np.testing.assert_allclose(cut.logp, narrow.logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cut.actual_logp, narrow.actual_logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(cut.tail_logp), np.exp(narrow.tail_logp), rtol=0, atol=1e-5)


async def test_rollouts_carry_the_policys_exact_logprobs_and_its_list(server: Endpoint, client: VllmCompletions):
    prompt, k = token_ids(10, seed=511), 6
    drawn = await client.sample(prompt, 3, SamplingParams(max_tokens=16, seed=5), k=k)
    assert len({tuple(rollout.completion_ids.tolist()) for rollout in drawn}) > 1
    for rollout in drawn:
        full = prompt + rollout.completion_ids.tolist()
        exact = logp_rows(server.model_dir, full)[len(prompt) - 1 : -1]
        realised = exact[np.arange(len(exact)), rollout.completion_ids]
        np.testing.assert_allclose(rollout.logp, realised, rtol=0, atol=TOLERANCE)
        assert rollout.topk is not None
        assert rollout.topk.start == len(prompt) - 1
        np.testing.assert_allclose(rollout.topk.logp, -np.sort(-exact, axis=1)[:, :k], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(rollout.topk.actual_ids, rollout.completion_ids)
        again = await client.score(full, len(prompt) - 1, k)
        np.testing.assert_allclose(again.actual_logp, rollout.logp, rtol=0, atol=TOLERANCE)
        assert rollout.sampling.seed == 5
        assert rollout.finish_reason in {"length", "stop"}


async def test_a_stop_token_ends_a_rollout_and_stays_in_it(server: Endpoint, client: VllmCompletions):
    prompt = token_ids(8, seed=512)
    [free] = await client.sample(prompt, 1, SamplingParams(max_tokens=12, seed=1))
    stop = int(free.completion_ids[2])
    [ended] = await client.sample(prompt, 1, SamplingParams(max_tokens=12, seed=1, stop_token_ids=(stop,)))
    assert ended.finish_reason == "stop"
    assert ended.completion_ids.tolist() == free.completion_ids.tolist()[: ended.completion_ids.size]
    assert ended.completion_ids[-1] == stop
    np.testing.assert_allclose(ended.logp, free.logp[: ended.logp.size], rtol=0, atol=TOLERANCE)


async def test_logprobs_of_a_distorted_draw_are_unknown_not_wrong(client: VllmCompletions):
    [rollout] = await client.sample(token_ids(8, seed=513), 1, SamplingParams(max_tokens=4, temperature=0.5, seed=1))
    assert np.isnan(rollout.logp).all()


async def test_sixteen_scores_at_once_equal_sixteen_in_turn(client: VllmCompletions):
    prompts = [token_ids(n, seed=520 + n) for n in (5, 90, 17, 2, 200, 33, 64, 9, 120, 48, 3, 77, 150, 21, 11, 40)]
    alone = [await client.score(ids, 0, 10) for ids in prompts]
    together = await asyncio.gather(*(client.score(ids, 0, 10) for ids in prompts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.actual_ids, other.actual_ids)
        np.testing.assert_allclose(one.actual_logp, other.actual_logp, rtol=0, atol=2e-5)
        np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=2e-5)


async def test_the_only_model_is_found_and_the_server_described(server: Endpoint):
    up = await connect(server.url, api_key=server.api_key)
    async with up:
        info = await up.server_info()
    assert (info.model, info.max_model_len) == (server.model, server.max_model_len)
    assert info.version == get(server, "/version").json()["version"]


async def test_k_above_the_limit_names_the_limit(server: Endpoint, client: VllmCompletions):
    with pytest.raises(KLimitError, match=f"K <= {server.max_logprobs}") as caught:
        await client.score(token_ids(5), 0, server.max_logprobs + 1)
    assert caught.value.limit == server.max_logprobs
    with pytest.raises(KLimitError) as caught:
        await client.sample(token_ids(5), 1, SamplingParams(max_tokens=1), k=server.max_logprobs + 1)
    assert caught.value.limit == server.max_logprobs
    assert client.metrics.get("retries", 0) == 0, "a refusal is final"


@pytest.mark.parametrize("extra", [0, 1, 500])
async def test_a_prompt_without_room_for_a_token_is_a_context_limit(
    server: Endpoint, client: VllmCompletions, extra: int
):
    ids = token_ids(server.max_model_len + extra)
    with pytest.raises(ContextLimitError):
        await client.score(ids, len(ids) - 10, 2)
    with pytest.raises(ContextLimitError):
        await client.sample(ids, 1, SamplingParams(max_tokens=1))


async def test_the_longest_prompt_that_fits_is_scored(server: Endpoint, client: VllmCompletions):
    ids = token_ids(server.max_model_len - 1, seed=530)
    rows = await client.score(ids, len(ids) - 9, 2)
    exact = logp_rows(server.model_dir, ids)[len(ids) - 9 : -1]
    np.testing.assert_allclose(rows.logp, -np.sort(-exact, axis=1)[:, :2], rtol=0, atol=TOLERANCE)


async def test_an_unknown_model_is_a_model_not_found(server: Endpoint):
    async with VllmCompletions(server.url, api_key=server.api_key, model="nobody", config=QUICK) as up:
        for call in (
            up.score(token_ids(5), 0, 2),
            up.sample(token_ids(5), 1, SamplingParams(max_tokens=1)),
            up.server_info(),
        ):
            with pytest.raises(ModelNotFoundError, match="nobody"):
                await call


async def test_an_id_outside_the_vocabulary_is_refused_by_us_or_by_the_server(server: Endpoint):
    ids = [9, 10, 5000]
    async with VllmCompletions(server.url, api_key=server.api_key, config=QUICK) as blind:
        with pytest.raises(RequestRefusedError, match="5000"):
            await blind.score(ids, 0, 2)
    async with VllmCompletions(server.url, api_key=server.api_key, config=QUICK, vocab_size=2048) as knowing:
        with pytest.raises(ValueError, match="5000"):
            await knowing.score(ids, 0, 2)


async def test_the_key_is_needed_used_and_never_shown(guarded: Endpoint):
    for key in (None, "sk-wrong-0123456789"):
        async with VllmCompletions(guarded.url, model=guarded.model, api_key=key, config=QUICK) as stranger:
            with pytest.raises(AuthError) as caught:
                await stranger.score(token_ids(5), 0, 2)
            assert "sk-" not in str(caught.value)
    async with VllmCompletions(guarded.url, api_key=API_KEY, config=QUICK) as up:
        rows = await up.score(token_ids(5), 0, 2)
        assert rows.rows == 4
        assert API_KEY not in repr(up) + repr(up.endpoint) + str(up.metrics)


@pytest.mark.parametrize("mode", ["wait", "keep"])
async def test_a_pause_is_waited_for(server: Endpoint, mode: str):
    """From 0.33 on a server rejects requests while it is paused; before, and in mode keep, it holds them."""
    options = {"api_key": server.api_key, "model": server.model}
    hasty = ClientConfig(max_retries=0, read_timeout_s=0.5, read_timeout_per_token_s=0.0, pause_timeout_s=0.0)
    patient = ClientConfig(max_retries=8, read_timeout_s=1.0, read_timeout_per_token_s=0.0)
    async with (
        VllmCompletions(server.url, config=patient, **options) as scorer,
        VllmGenerate(server.url, config=patient, **options) as sampler,
        VllmCompletions(server.url, config=hasty, **options) as refused_once,
    ):
        assert post(server, f"/pause?mode={mode}", None).status_code == 200
        try:
            scoring = asyncio.create_task(scorer.score(token_ids(5), 0, 2))
            drawing = asyncio.create_task(sampler.sample(token_ids(5), 2, SamplingParams(4, stop_token_ids=(0,))))
            with pytest.raises(ServerPausedError, match="paused"):
                await refused_once.score(token_ids(5), 0, 2)
            async with asyncio.timeout(240):
                while "pauses" not in scorer.metrics or "pauses" not in sampler.metrics:
                    await asyncio.sleep(0.05)
            assert "retries" not in scorer.metrics
        finally:
            post(server, "/resume", None)
        assert (await scoring).rows == 4
        assert len(await drawing) == 2
    async with VllmCompletions(server.url, api_key=server.api_key, model=server.model) as up:
        assert (await up.score(token_ids(5), 0, 2)).rows == 4


async def test_a_generation_aborted_by_a_pause_is_drawn_again_not_kept_short(server: Endpoint):
    config = ClientConfig(max_retries=8, backoff_s=0.2, backoff_max_s=0.5)
    async with VllmCompletions(server.url, api_key=server.api_key, model=server.model, config=config) as up:
        params = SamplingParams(max_tokens=900, seed=3)
        drawing = asyncio.create_task(up.sample(token_ids(6, seed=540), 4, params))
        await asyncio.to_thread(until_busy, server, drawing.done)
        await asyncio.to_thread(post, server, "/pause?mode=abort", None)
        await asyncio.to_thread(post, server, "/resume", None)
        drawn = await asyncio.wait_for(drawing, 240)
    for rollout in drawn:
        assert rollout.finish_reason in {"stop", "length"}
        assert rollout.finish_reason == "stop" or rollout.completion_ids.size == 900


@pytest.mark.vllm
@pytest.mark.slow
async def test_cancelling_reaches_the_server(vllm: Endpoint):
    async with VllmCompletions(vllm.url, model=vllm.model, config=QUICK) as up:
        drawing = asyncio.create_task(up.sample(token_ids(6), 16, SamplingParams(max_tokens=1000)))
        await asyncio.to_thread(until_busy, vllm, drawing.done)
        assert not drawing.done()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        async with asyncio.timeout(240):
            while await asyncio.to_thread(running, vllm):
                await asyncio.sleep(0.05)
        prompts = [
            float(line.rsplit(" ", 1)[1])
            for line in get(vllm, "/metrics").text.splitlines()
            if line.startswith("vllm:request_success") and 'finished_reason="abort"' in line
        ]
        assert sum(prompts) >= 1, "the server counts an aborted request"
        assert (await up.score(token_ids(5), 0, 2)).rows == 4


async def test_a_server_killed_in_mid_request_is_unreachable_in_bounded_time(doomed: Endpoint):
    """Last of all (see conftest): nothing is left to talk to afterwards."""
    async with VllmCompletions(doomed.url, model=doomed.model, api_key=doomed.api_key, config=QUICK) as up:
        assert (await up.score(token_ids(5), 0, 2)).rows == 4
        drawing = asyncio.create_task(up.sample(token_ids(6), 8, SamplingParams(max_tokens=1000)))
        await asyncio.to_thread(until_busy, doomed, drawing.done)
        assert not drawing.done()
        doomed.kill()
        async with asyncio.timeout(240):
            with pytest.raises(ServerUnreachableError, match=doomed.url):
                await drawing
            with pytest.raises(ServerUnreachableError):
                await up.score(token_ids(5), 0, 2)
