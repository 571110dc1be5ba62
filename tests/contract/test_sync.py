"""The weight sinks against both servers: what they confirm is what is generated afterwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.contract.conftest import Models
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.test_weights import _reload
from tests.contract.wire import get, token_ids
from topkd.clients import VllmCompletions, VllmWeightSink
from topkd.topk import SamplingParams
from topkd.topk.errors import SyncError
from topkd.topk.protocols import WeightUpdate

PROMPT = token_ids(150, seed=91)


async def _error(server: Endpoint, model: str, folder, adapter=None) -> float:
    """Largest error of the logprobs of six generated tokens under ``model``."""
    async with VllmCompletions(server.url, model=model, api_key=server.api_key) as client:
        (rollout,) = await client.sample(PROMPT, 1, SamplingParams(max_tokens=6, seed=3))
    rows = logp_rows(folder, PROMPT + rollout.completion_ids.tolist(), adapter=adapter)[len(PROMPT) - 1 : -1]
    return float(np.abs(rows[np.arange(len(rows)), rollout.completion_ids] - rollout.logp).max())


async def test_a_full_push_is_confirmed_and_is_what_is_generated(server: Endpoint, models: Models, cleanup: Callable):
    cleanup(_reload, server, models.policy, "default")
    assert await _error(server, server.model, models.policy) < 1e-4
    async with VllmWeightSink(
        server.url, model=server.model, api_key=server.api_key, reference=str(models.policy)
    ) as sink:
        assert await sink.push(WeightUpdate("full", str(models.updated), "step-3")) == "step-3"
    assert get(server, "/weight_info").json() == {"weight_version": "step-3"}
    assert await _error(server, server.model, models.updated) < 1e-4


async def test_adapters_are_pushed_by_versioned_name(server: Endpoint, models: Models):
    async with VllmWeightSink(server.url, model=server.model, api_key=server.api_key, keep_adapters=1) as sink:
        for version, adapter in (("1", models.adapter), ("2", models.updated_adapter)):
            await sink.push(WeightUpdate("lora", str(adapter), version))
            assert sink.sampling_model == f"{server.model}@{version}"
            assert await _error(server, sink.sampling_model, models.policy, adapter) < 1e-4
        assert await sink._adapter_names() == [server.model, f"{server.model}@2"]
        await sink._unload_adapter({"lora_name": f"{server.model}@2"})


async def test_a_folder_that_cannot_be_loaded_never_reaches_the_server(server: Endpoint, models: Models, tmp_path):
    async with VllmWeightSink(server.url, model=server.model, api_key=server.api_key) as sink:
        with pytest.raises(SyncError, match="not touched"):
            await sink.push(WeightUpdate("full", str(tmp_path), "v"))
    assert await _error(server, server.model, models.policy) < 1e-4
