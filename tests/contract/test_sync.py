"""Weight sinks against both servers: what was pushed is what is sampled from, and a bad checkpoint changes nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.contract.conftest import Models
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import get, post, token_ids, until_busy
from tests.fakes.tinymodels import make_tiny_model
from topkd.clients import ClientConfig
from topkd.clients.dialects.vllm import VllmCompletions
from topkd.clients.dialects.vllm_generate import VllmGenerate
from topkd.clients.weights.sinks import VllmWeightSink
from topkd.topk.errors import TopkdError
from topkd.topk.protocols import WeightUpdate
from topkd.topk.samples import SamplingParams

TOLERANCE = 1e-4
PROMPT = token_ids(80, seed=800)
QUICK = ClientConfig(max_retries=1, backoff_s=0.05)


@pytest.fixture
async def sink(server: Endpoint, models: Models) -> AsyncIterator[VllmWeightSink]:
    async with VllmWeightSink(server.url, model=server.model, api_key=server.api_key, config=QUICK) as up:
        yield up
        await up.push(WeightUpdate("full", str(models.policy), "default"))
        for card in get(server, "/v1/models").json()["data"]:
            if "@" in card["id"]:
                post(server, "/v1/unload_lora_adapter", {"lora_name": card["id"]})


async def _error(
    server: Endpoint, model: str, folder: Path, adapter: Path | None = None, made: type[VllmCompletions] = VllmGenerate
) -> tuple[float, str]:
    """Largest error of sampled logprobs against these weights, and the version the samples name."""
    async with made(server.url, model=model, api_key=server.api_key, config=QUICK) as up:
        [rollout] = await up.sample(PROMPT, 1, SamplingParams(max_tokens=8, seed=1))
    exact = logp_rows(folder, PROMPT + rollout.completion_ids.tolist(), adapter=adapter)[len(PROMPT) - 1 : -1]
    realised = exact[np.arange(len(exact)), rollout.completion_ids]
    return float(np.abs(rollout.logp - realised).max()), rollout.version


async def test_full_weights_are_sampled_from_at_once_under_their_version(
    server: Endpoint, sink: VllmWeightSink, models: Models
):
    assert (await _error(server, server.model, models.policy))[0] < TOLERANCE
    assert await sink.push(WeightUpdate("full", str(models.updated), "step-1")) == "step-1"
    error, version = await _error(server, server.model, models.updated)
    assert error < TOLERANCE, "a stale prefix cache would show here"
    assert version == "step-1"
    # vLLM 0.32 leaves it out of this route's replies: it is what /weight_info says before and after.
    assert (await _error(server, server.model, models.updated, made=VllmCompletions))[1] == "step-1"
    assert get(server, "/weight_info").json() == {"weight_version": "step-1"}
    assert get(server, "/is_paused").json() == {"is_paused": False}


async def test_adapters_are_served_under_new_names_and_the_oldest_go(
    server: Endpoint, sink: VllmWeightSink, models: Models
):
    folders = [models.adapter, models.updated_adapter, models.adapter]
    for step, folder in enumerate(folders):
        await sink.push(WeightUpdate("lora", str(folder), f"lora-{step}"))
        assert sink.sampling_model is not None
        for made in (VllmGenerate, VllmCompletions):
            error, version = await _error(server, sink.sampling_model, models.policy, folder, made)
            assert error < TOLERANCE
            assert version == f"lora-{step}", "the adapter's, not that of the weights underneath"
    names = {card["id"] for card in get(server, "/v1/models").json()["data"]}
    assert sink.sampling_model in names
    assert sum("lora-" in name for name in names) == 2, "two are kept: samples in flight may still need the last one"


async def test_a_checkpoint_that_cannot_be_loaded_never_reaches_the_server(
    server: Endpoint, sink: VllmWeightSink, models: Models, tmp_path: Path
):
    """A reload that fails inside the engine is fatal to it, so the folder is checked before anything is paused."""
    await sink.push(WeightUpdate("full", str(models.policy), "default"))  # the sink now knows the shapes
    torn = tmp_path / "torn"
    shutil.copytree(models.updated, torn)
    with (torn / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    other = make_tiny_model(tmp_path / "other", hidden=32)
    for kind, folder in (("full", tmp_path / "missing"), ("full", torn), ("full", other), ("lora", torn)):
        with pytest.raises(TopkdError):
            await sink.push(WeightUpdate(kind, str(folder), "bad"))  # type: ignore[arg-type]
    assert get(server, "/is_paused").json() == {"is_paused": False}
    error, version = await _error(server, server.model, models.policy)
    assert error < TOLERANCE
    assert version == "default"


async def test_a_push_waits_for_the_draw_in_flight_and_the_draw_is_of_one_version(
    server: Endpoint, sink: VllmWeightSink, models: Models
):
    async with VllmGenerate(server.url, model=server.model, api_key=server.api_key, config=QUICK) as up:
        drawing = asyncio.create_task(up.sample(PROMPT, 1, SamplingParams(max_tokens=200, seed=2)))
        await asyncio.to_thread(until_busy, server, drawing.done)
        await sink.push(WeightUpdate("full", str(models.updated), "step-2"))
        [rollout] = await drawing
    folder = {"default": models.policy, "step-2": models.updated}[rollout.version]
    exact = logp_rows(folder, PROMPT + rollout.completion_ids.tolist())[len(PROMPT) - 1 : -1]
    realised = exact[np.arange(len(exact)), rollout.completion_ids]
    np.testing.assert_allclose(rollout.logp, realised, rtol=0, atol=TOLERANCE)
