"""Fleets of running servers in every dialect that they speak, and of two engines that serve the same model."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import SecretStr

from tests.contract.conftest import API_KEY, MAX_LOGPROBS, MAX_MODEL_LEN, Models
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint, embedded_server
from topkd.clients import Fleet, Sglang, VllmCompletions, VllmGenerate, connect
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.samples import SamplingParams

IDS = np.random.default_rng(31).integers(8, 2048, 40).astype(np.int32)


def twins(server: Endpoint) -> list[str]:
    """Two addresses of one server: replicas that must agree to the last bit."""
    return [server.url, server.url.replace("127.0.0.1", "localhost")]


async def check(fleet: Fleet, server: Endpoint) -> None:
    """Scores, draws and agreement of a fleet, against the served model in float64."""
    truth = logp_rows(server.model_dir, IDS.tolist())
    assert await fleet.agreement(IDS, 0, 8) < 1e-4
    for _ in range(4):
        topk = await fleet.score(IDS, 5, 8)
        np.testing.assert_allclose(topk.actual_logp, truth[np.arange(5, IDS.size - 1), IDS[6:]], atol=1e-4)
    [rollout] = await fleet.sample(IDS[:8], 1, SamplingParams(4, seed=1))
    again = await fleet.score(np.concatenate([IDS[:8], rollout.completion_ids]), 7, 8)
    np.testing.assert_allclose(again.actual_logp, rollout.logp, atol=1e-4)


@pytest.mark.parametrize(
    ("dialect", "made"), [("vllm", VllmCompletions), ("vllm_generate", VllmGenerate), ("auto", VllmGenerate)]
)
async def test_a_fleet_of_the_embedded_server_speaks_either_dialect(embedded: Endpoint, dialect: str, made: type):
    async with await connect(twins(embedded), dialect=dialect, api_key=API_KEY) as fleet:
        assert [type(replica.client) for replica in fleet.replicas] == [made, made]
        await check(fleet, embedded)


async def test_replicas_that_speak_sglang_and_vllm_are_found_out_one_by_one(
    embedded: Endpoint, models: Models, tmp_path
):
    config = ServeConfig(
        model=str(models.policy), served_model_name="t", port=0, dialect="sglang", api_key=SecretStr(API_KEY)
    )
    with ServerProcess(config, log_path=tmp_path / "server.log") as up:
        async with await connect([embedded.url, up.url], dialect="auto", api_key=API_KEY) as fleet:
            assert [type(replica.client) for replica in fleet.replicas] == [VllmGenerate, Sglang]
            await check(fleet, embedded)
        async with await connect([up.url], dialect="sglang", api_key=API_KEY) as fleet:
            wanted = (await fleet.score(IDS, 5, 3)).ids
            truth = logp_rows(models.policy, IDS.tolist())[5:-1]
            got = await fleet.score_candidates(IDS, 5, wanted)
            np.testing.assert_allclose(got, np.take_along_axis(truth, wanted, axis=1), atol=1e-4)


@pytest.mark.vllm
@pytest.mark.slow
async def test_a_real_vllm_and_the_embedded_server_are_replicas_of_one_teacher(
    vllm: Endpoint, models: Models, tmp_path
):
    options = {"log": tmp_path / "server.log", "max_logprobs": MAX_LOGPROBS, "max_model_len": MAX_MODEL_LEN}
    with embedded_server(models.policy, model="t", **options) as twin:
        async with await connect([vllm.url, twin.url], dialect="auto") as fleet:
            assert await fleet.agreement(IDS, 0, 8) < 1e-3
            truth = logp_rows(vllm.model_dir, IDS.tolist())
            for _ in range(6):
                topk = await fleet.score(IDS, 0, 8)
                np.testing.assert_allclose(topk.actual_logp, truth[np.arange(IDS.size - 1), IDS[1:]], atol=1e-3)
