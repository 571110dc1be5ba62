"""``topkd train`` with the student sampled from a server whose model's ``generation_config`` is hostile."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import MAX_LOGPROBS, MAX_MODEL_LEN, SERVERS, Models, need_vllm
from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint, embedded_server, vllm_server
from tests.contract.wire import get, token_ids
from topkd.clients import VllmCompletions, VllmGenerate
from topkd.clients.weights.sinks import VllmWeightSink
from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.topk.protocols import WeightUpdate
from topkd.topk.samples import SamplingParams

HOSTILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.3}
TOLERANCE = 1e-4
STEPS = 3


@pytest.fixture(scope="module", params=SERVERS)
def hostile(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """A server of the policy; its folder asks for another temperature, a truncation, a penalty and ends of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(models.policy, folder / "model")
    ends = list(range(100, 160))
    (folder / "model" / "generation_config.json").write_text(json.dumps(HOSTILE | {"eos_token_id": ends}))
    limits = {"max_logprobs": MAX_LOGPROBS, "max_model_len": MAX_MODEL_LEN}
    if request.param == "vllm":
        need_vllm()
        with vllm_server(folder / "model", model="t", log=folder / "server.log", lora=True, **limits) as up:
            yield up
    else:
        with embedded_server(folder / "model", model="t", log=folder / "server.log", **limits) as up:
            yield up


@pytest.fixture(scope="module")
def teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    log = tmp_path_factory.mktemp("teacher") / "server.log"
    with embedded_server(models.updated, model="teacher", log=log, max_logprobs=20, max_model_len=256) as up:
        yield up


def config(hostile: Endpoint, teacher: Endpoint, data: Path, **changes: Any) -> RunConfig:
    data.write_text("".join(json.dumps({"prompt_ids": token_ids(20 + i, seed=i)}) + "\n" for i in range(8)))
    values = {
        "steps": STEPS,
        "max_staleness": 0,
        "student": {"model": str(hostile.model_dir), "device": "cpu"},
        "teacher": {"url": teacher.url},
        "data": {"path": str(data)},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_completion_tokens": 16},
        "learner": {"lr": 3e-3},
        "sampler": {"kind": "server", "url": hostile.url},
    }
    return RunConfig.model_validate(values | changes)


@pytest.mark.parametrize("dialect", [VllmCompletions, VllmGenerate])
async def test_rollouts_are_the_policys_own_whatever_the_generation_config_says(
    hostile: Endpoint, dialect: type[VllmCompletions]
):
    """Each logprob is the full softmax's, each end one that was asked for, and draws follow the policy (chi-square)."""
    prompt = token_ids(30, seed=77)
    async with dialect(hostile.url, model=hostile.model) as client:
        rollouts = await client.sample(prompt, 4, SamplingParams(max_tokens=24, seed=1, stop_token_ids=(2,)))
        params = [SamplingParams(max_tokens=1, seed=100 * i, stop_token_ids=(2,)) for i in range(50)]
        batches = await asyncio.gather(*(client.sample(prompt, 30, one) for one in params))
        drawn = [rollout for batch in batches for rollout in batch]
    for rollout in rollouts:
        exact = logp_rows(hostile.model_dir, prompt + rollout.completion_ids.tolist())[len(prompt) - 1 : -1]
        np.testing.assert_allclose(
            rollout.logp, exact[np.arange(len(exact)), rollout.completion_ids], rtol=0, atol=TOLERANCE
        )
        assert rollout.finish_reason == "length" or rollout.completion_ids[-1] == 2
    p = np.exp(logp_rows(hostile.model_dir, prompt)[-1])
    order = np.argsort(-p)
    groups = [*([token] for token in order[:8]), order[8:20], order[20:60], order[60:]]  # top_k 20 would empty the last
    expected = np.array([p[group].sum() for group in groups]) * len(drawn)
    counts = np.bincount([int(one.completion_ids[0]) for one in drawn], minlength=p.size)
    chi_square = float(sum((counts[g].sum() - e) ** 2 / e for g, e in zip(groups, expected, strict=True)))
    assert expected.min() > 5
    assert chi_square < 37.7, "1e-4 of the tail of 10 degrees of freedom"


async def _restore(hostile: Endpoint) -> None:
    async with VllmWeightSink(hostile.url, model=hostile.model) as sink:
        await sink.push(WeightUpdate("full", str(hostile.model_dir), "default"))


async def _error(hostile: Endpoint, folder: Path, model: str) -> float:
    prompt = token_ids(30, seed=5)
    async with VllmGenerate(hostile.url, model=model) as client:
        [rollout] = await client.sample(prompt, 1, SamplingParams(max_tokens=8, seed=1))
    exact = logp_rows(folder, prompt + rollout.completion_ids.tolist())[len(prompt) - 1 : -1]
    return float(np.abs(rollout.logp - exact[np.arange(len(exact)), rollout.completion_ids]).max())


def _exact(steps: list[dict[str, Any]]) -> None:
    assert [step["rollout_versions"] for step in steps] == [["0"], ["1"], ["2"]]
    for step in steps:
        assert step["sync_kl"] < 1e-6
        assert step["behavior_kl_k3"] < 1e-6, "every sampled token has the probability that the learner gives it"
        assert step["ratio_max"] == pytest.approx(1.0, abs=1e-3)
        assert (step["lost"], step["sampler_lost"], step["skipped"]) == ({}, {}, "")


async def test_a_run_samples_each_step_from_full_weights_that_were_reloaded(
    hostile: Endpoint, teacher: Endpoint, tmp_path: Path
):
    try:
        await train(config(hostile, teacher, tmp_path / "prompts.jsonl"), tmp_path / "run")
        _exact(read_metrics(tmp_path / "run" / "metrics.jsonl", "step"))
        assert await _error(hostile, tmp_path / "run" / "student", hostile.model) < TOLERANCE
        assert await _error(hostile, hostile.model_dir, hostile.model) > 0.01, "three steps must show"
        assert get(hostile, "/weight_info").json()["weight_version"].startswith(f"{STEPS}-")
        assert get(hostile, "/is_paused").json() == {"is_paused": False}
    finally:
        await _restore(hostile)


async def test_a_run_samples_each_step_from_an_adapter_of_its_own(hostile: Endpoint, teacher: Endpoint, tmp_path: Path):
    student = {"model": str(hostile.model_dir), "device": "cpu", "lora": {"r": 4, "alpha": 8.0}}
    run = config(hostile, teacher, tmp_path / "prompts.jsonl", student=student)
    await train(run, tmp_path / "run")
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    _exact(steps)
    assert all(step["sync_bytes"] < 200_000 for step in steps), "an adapter, not the model"
    assert steps[-1]["kl_k1"] != steps[0]["kl_k1"]
    names = [card["id"] for card in get(hostile, "/v1/models").json()["data"]]
    assert names == [hostile.model], "no adapter stays behind"
    assert await _error(hostile, hostile.model_dir, hostile.model) < TOLERANCE, "the base model was left alone"
