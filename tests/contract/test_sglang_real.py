"""A real SGLang on CPU: scores, draws, pushes, adapters and runs against float64; ``make test-sglang`` starts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.contract.conftest import Models
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint, embedded_server
from tests.contract.sglang_server import SGLANG_PYTHON, sglang_server
from tests.contract.wire import token_ids
from topkd.clients import ClientConfig, Sglang, SglangWeightSink
from topkd.clients.probe.probe import probe
from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.topk.errors import ContextLimitError, SyncError, TopkdError
from topkd.topk.protocols import WeightUpdate
from topkd.topk.samples import SamplingParams

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
TOLERANCE = 2e-4  # float32 against float64 on these weights
VOCAB, CONTEXT = 2048, 512
QUICK = ClientConfig(max_retries=1, backoff_s=0.05)


@pytest.fixture(scope="module")
def sglang(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    if not SGLANG_PYTHON.exists():
        pytest.fail(f"no real SGLang at {SGLANG_PYTHON}: run `bash scripts/setup_sglang.sh`", pytrace=False)
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    with sglang_server(models.policy, model="s", log=log, max_model_len=CONTEXT, lora=True) as up:
        yield up


@pytest.fixture
async def client(sglang: Endpoint) -> AsyncIterator[Sglang]:
    async with Sglang(sglang.url, model="s", config=QUICK) as up:
        yield up


@pytest.fixture
async def sink(sglang: Endpoint, models: Models) -> AsyncIterator[SglangWeightSink]:
    """A sink; the server has its first weights and no adapter when the test is over."""
    async with SglangWeightSink(sglang.url, model="s", config=QUICK) as up:
        yield up
        await up.unload()
        await up.push(WeightUpdate("full", str(models.policy), "default"))


def _get(sglang: Endpoint, path: str) -> Any:
    return httpx.get(sglang.url + path, trust_env=False, timeout=30).json()


@pytest.mark.parametrize(
    ("length", "start", "k"), [(20, 0, 20), (60, 41, 5), (64, 0, 0), (40, 3, VOCAB), (200, 63, 64)]
)
async def test_scores_are_the_models_own(client: Sglang, models: Models, length: int, start: int, k: int):
    ids = token_ids(length, seed=length)
    scores = await client.score(ids, start, k)
    exact = logp_rows(models.policy, ids)[start:-1]
    realised = exact[np.arange(len(exact)), ids[start + 1 :]]
    assert np.abs(scores.actual_logp - realised).max() < TOLERANCE
    if k:
        assert np.abs(scores.logp - np.take_along_axis(exact, scores.ids.astype(np.int64), axis=1)).max() < TOLERANCE
        assert np.abs(scores.logp - -np.sort(-exact, axis=1)[:, :k]).max() < TOLERANCE, "the K largest"
    assert client.metrics["decoded_flat" if k else "decoded_nested"] == 1


async def test_the_vocabulary_and_the_longest_prompt_are_what_the_server_takes(client: Sglang):
    facts, info = await client.facts(), await client.server_info()
    assert (facts.vocab_size, info.max_model_len) == (VOCAB, CONTEXT - 7)
    assert (await client.score(token_ids(CONTEXT - 7, seed=1), CONTEXT - 10, 1)).rows == 2
    with pytest.raises(ContextLimitError):
        await client.score(token_ids(CONTEXT - 6, seed=1), CONTEXT - 10, 1)


@pytest.mark.parametrize("known", [VOCAB, None])
async def test_a_prompt_with_the_vocabularys_last_id_is_scored(sglang: Endpoint, models: Models, known: int | None):
    ids = [5, VOCAB - 1, 100, VOCAB - 2, 7, VOCAB - 1]
    async with Sglang(sglang.url, model="s", vocab_size=known, config=QUICK) as client:
        for start in (0, 1, 3):
            scores = await client.score(ids, start, 8)
            exact = logp_rows(models.policy, ids)[start:-1]
            assert np.abs(scores.actual_logp - exact[np.arange(len(exact)), ids[start + 1 :]]).max() < TOLERANCE
        asked = np.tile(np.array([[3, VOCAB - 1, -1]], np.int32), (5, 1))
        got = await client.score_candidates(ids, 0, asked)
        exact = logp_rows(models.policy, ids)[:-1]
        assert np.abs(got[:, :2] - exact[:, [3, VOCAB - 1]]).max() < TOLERANCE


async def test_nothing_that_ends_the_server_is_sent(client: Sglang, sglang: Endpoint):
    """K above the vocabulary, ids outside it, an empty prompt: cut or refused here, and the server lives."""
    assert (await client.score(token_ids(12, seed=2), 0, 4 * VOCAB)).k == VOCAB
    for ids in ([5, VOCAB, 7], [5, 999_999, 7], [5, -1, 7], []):
        with pytest.raises(TopkdError):
            await client.score(ids, 0, 1)
        with pytest.raises(TopkdError):
            await client.sample(ids, 1, SamplingParams(2))
    with pytest.raises(TopkdError):
        await client.score_candidates(token_ids(6, seed=3), 0, np.full((5, 1), VOCAB, np.int32))
    [drawn] = await client.sample(token_ids(6, seed=3), 1, SamplingParams(2), k=4 * VOCAB)
    assert drawn.topk is not None
    assert drawn.topk.k == VOCAB
    assert httpx.get(sglang.url + "/health", trust_env=False).status_code == 200


async def test_draws_are_the_policys_own_and_n_of_them_differ(client: Sglang, models: Models):
    prompt = token_ids(30, seed=4)
    rollouts = await client.sample(prompt, 4, SamplingParams(12, seed=1), k=5)
    assert len({tuple(rollout.completion_ids.tolist()) for rollout in rollouts}) > 1
    for rollout in rollouts:
        exact = logp_rows(models.policy, prompt + rollout.completion_ids.tolist())[len(prompt) - 1 : -1]
        assert np.abs(rollout.logp - exact[np.arange(len(exact)), rollout.completion_ids]).max() < TOLERANCE


async def _error(sglang: Endpoint, folder: Path, model: str, adapter: Path | None = None) -> tuple[float, str]:
    """The largest error of sampled logprobs against these weights, and the version that the draw names."""
    prompt = token_ids(30, seed=5)
    async with Sglang(sglang.url, model="s", config=QUICK) as client:
        [rollout] = await client.under(model).sample(prompt, 1, SamplingParams(8, seed=1))
    exact = logp_rows(folder, prompt + rollout.completion_ids.tolist(), adapter=adapter)[len(prompt) - 1 : -1]
    return float(np.abs(rollout.logp - exact[np.arange(len(exact)), rollout.completion_ids]).max()), rollout.version


async def test_full_weights_are_sampled_from_and_the_server_goes_on(
    sglang: Endpoint, sink: SglangWeightSink, models: Models
):
    assert await sink.push(WeightUpdate("full", str(models.updated), "step-1")) == "step-1"
    error, version = await _error(sglang, models.updated, "s")
    assert (error < TOLERANCE, version) == (True, "step-1")
    async with Sglang(sglang.url, model="s", config=QUICK) as later:  # it now calls its model by the folder
        assert (await later.server_info()).model == "s"
    assert _get(sglang, "/v1/models")["data"][0]["id"] == str(models.updated)


async def test_weights_that_do_not_fit_leave_the_server_running(
    sglang: Endpoint, sink: SglangWeightSink, models: Models, tmp_path: Path
):
    broken = tmp_path / "broken"
    shutil.copytree(models.updated, broken)
    [weights] = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(TopkdError):
        await sink.push(WeightUpdate("full", str(broken), "step-2"))
    assert (await _error(sglang, models.policy, "s"))[0] < TOLERANCE, "it answers, from the weights it had"


async def test_an_adapter_is_what_is_sampled_under_its_name(sglang: Endpoint, sink: SglangWeightSink, models: Models):
    await sink.push(WeightUpdate("lora", str(models.adapter), "1"))
    assert sink.sampling_model == "s@1"
    assert (await _error(sglang, models.policy, "s@1", models.adapter))[0] < TOLERANCE
    assert (await _error(sglang, models.policy, "s@1"))[0] > 0.01, "the adapter must change the distribution"
    assert (await _error(sglang, models.policy, "s"))[0] < TOLERANCE
    async with Sglang(sglang.url, model="s@1", config=QUICK) as named, Sglang(sglang.url, config=QUICK) as unnamed:
        ids = token_ids(20, seed=6)
        scores = await named.score(ids, 0, 3)
        exact = logp_rows(models.policy, ids, adapter=models.adapter)[:-1]
        assert np.abs(scores.actual_logp - exact[np.arange(19), ids[1:]]).max() < TOLERANCE
        assert await unnamed.model_name() != "s@1", "the base model is the only one that is no adapter"


async def test_an_adapter_that_the_server_refuses_is_one_clear_error(sink: SglangWeightSink, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 999, "lora_alpha": 1}))
    with pytest.raises((SyncError, TopkdError)):
        await sink.push(WeightUpdate("lora", str(tmp_path), "2"))


async def test_the_probe_says_what_this_server_can_do(sglang: Endpoint):
    report = await probe(sglang.url)
    assert report.dialect == "sglang"
    assert report.can_teach


@pytest.fixture(scope="module")
def teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    log = tmp_path_factory.mktemp("teacher") / "server.log"
    with embedded_server(models.updated, model="teacher", log=log, max_logprobs=20, max_model_len=256) as up:
        yield up


@pytest.mark.parametrize("kind", ["full", "lora"])
async def test_a_six_step_run_samples_its_own_weights_throughout(
    sglang: Endpoint, teacher: Endpoint, models: Models, tmp_path: Path, kind: str, sink: SglangWeightSink
):
    del sink  # puts the first weights back
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": token_ids(20 + i, seed=i)}) + "\n" for i in range(8)))
    values: dict[str, Any] = {
        "steps": 6,
        "max_staleness": 0,
        "student": {"model": str(models.policy), "device": "cpu"},
        "teacher": {"url": teacher.url},
        "data": {"path": str(data)},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_completion_tokens": 16},
        "learner": {"lr": 3e-3},
        "sampler": {"kind": "server", "url": sglang.url, "model": "s"},
    }
    if kind == "lora":
        values["student"]["lora"] = {"r": 4, "alpha": 8.0}
    await train(RunConfig.model_validate(values), tmp_path / "run")
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    assert [step["rollout_versions"] for step in steps] == [[str(step)] for step in range(6)]
    for step in steps:
        assert step["sync_kl"] < 1e-6
        assert step["behavior_kl_k3"] < 1e-6, "every sampled token has the probability that the learner gives it"
        assert (step["lost"], step["sampler_lost"], step["skipped"]) == ({}, {}, "")
    assert steps[-1]["kl_k1"] != steps[0]["kl_k1"]
