"""The student sampled from a server: what was pushed is what is sampled from, step by step, or the run ends."""

import copy
import json

import numpy as np
import pytest
import torch

from tests.engine.pieces import model_folder
from tests.faults.server import FaultyServer
from topkd.clients import VllmGenerate
from topkd.clients.weights.sinks import VllmWeightSink
from topkd.compose.config.run_config import RunConfig
from topkd.compose.preflight.preflight import check_sampler
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.student import Student
from topkd.engine.weight_sync import sync
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import (
    ConfigError,
    ModelNotFoundError,
    ServerBusyError,
    ServerUnreachableError,
    SyncError,
    UnsupportedError,
)
from topkd.topk.protocols import WeightUpdate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": [5 + i, 9, 40], "id": i}) + "\n" for i in range(24)))
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2), data


def served(folder, **more):
    return ServerProcess(ServeConfig(model=str(folder), port=0, device="cpu", **more))


@pytest.fixture(scope="module")
def teacher(folders):
    with served(folders[1], served_model_name="teacher") as up:
        yield up


@pytest.fixture(scope="module")
def sampler(folders):
    with served(folders[0], served_model_name="student") as up:
        yield up


def run_config(folders, teacher, sampler, /, **changes):
    values = {
        "steps": 4,
        "seed": 1,
        "max_staleness": 0,
        "student": {"model": str(folders[0]), "device": "cpu"},
        "teacher": {"url": teacher.url},
        "data": {"path": str(folders[2])},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 2, "max_completion_tokens": 8},
        "learner": {"lr": 3e-3},
        "client": {"max_retries": 2, "total_timeout_s": 120.0, "backoff_s": 0.1},
        "sampler": {"kind": "server", "url": sampler.url},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return RunConfig.model_validate(values)


def steps_of(out):
    return read_metrics(out / "metrics.jsonl", "step")


@pytest.mark.parametrize("staleness", [0, 1])
async def test_each_step_is_sampled_from_the_weights_the_schedule_says(folders, teacher, sampler, tmp_path, staleness):
    await train(run_config(folders, teacher, sampler, max_staleness=staleness), tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert [step["rollout_versions"] for step in steps] == [[str(max(0, n - staleness))] for n in range(4)]
    assert [step["sampler_version"] for step in steps] == ["1", "2", "3", "4"]
    assert all(abs(step["sync_kl"]) < 1e-6 and step["sync_worst_nats"] < 1e-3 for step in steps)
    assert all(step["sampler_lost"] == {} and step["lost"] == {} for step in steps)
    for step in steps:
        if step["staleness"] == 0:  # every sampled token's own logprob is the learner's, in another process
            assert step["behavior_kl_k3"] < 1e-6
            assert step["ratio_max"] == pytest.approx(1.0, abs=1e-3)
    assert not (tmp_path / "run" / "weights").exists(), "pushed weights are cleaned away"
    student = LocalTeacher(Student.load(str(tmp_path / "run" / "student"), "cpu"))
    async with VllmGenerate(sampler.url, model="student") as client:
        held, learnt = await client.score([5, 9, 40, 41, 42], 2, 5), await student.score([5, 9, 40, 41, 42], 2, 5)
    np.testing.assert_allclose(held.actual_logp, learnt.actual_logp, atol=1e-4)


async def test_a_push_by_somebody_else_ends_the_run_instead_of_giving_their_samples(
    folders, teacher, sampler, tmp_path, monkeypatch
):
    """Another program changes the weights between two draws: the version in the replies tells."""
    real = VllmGenerate.sample

    async def meddled(self, prompt, n, params, *, k=0):
        if params.max_tokens > 1:  # a draw, not the probe behind a push
            async with VllmWeightSink(sampler.url, model="student") as other:
                await other.push(WeightUpdate("full", str(folders[1]), "theirs"))
        return await real(self, prompt, n, params, k=k)

    monkeypatch.setattr(VllmGenerate, "sample", meddled)
    with pytest.raises(SyncError, match=r"sampled from other weights.*got 'theirs'.*expected '0-"):
        await train(run_config(folders, teacher, sampler), tmp_path / "run")
    assert steps_of(tmp_path / "run") == []


async def test_weights_that_are_not_what_was_pushed_are_found_before_anything_is_sampled(
    folders, teacher, sampler, tmp_path, monkeypatch
):
    """The server confirms the version, and holds another model: only what it samples can tell."""
    real = VllmWeightSink.push

    async def misled(self, update):
        return await real(self, WeightUpdate(update.kind, str(folders[1]), update.version))

    monkeypatch.setattr(VllmWeightSink, "push", misled)
    with pytest.raises(SyncError, match=r"does not sample from the weights that were pushed.*KL"):
        await train(run_config(folders, teacher, sampler), tmp_path / "run")


async def test_a_prompt_that_the_server_cannot_answer_is_lost_and_counted(
    folders, teacher, sampler, tmp_path, monkeypatch
):
    real, asked = VllmGenerate.sample, []

    async def failing(self, prompt, n, params, *, k=0):
        if params.max_tokens > 1:
            asked.append(prompt)
            if len(asked) % 6 == 2:
                raise ServerBusyError("the server aborted the generation")
        return await real(self, prompt, n, params, k=k)

    monkeypatch.setattr(VllmGenerate, "sample", failing)
    config = run_config(folders, teacher, sampler, cache={"path": str(tmp_path / "cache")})
    await train(config, tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert [step["lost"] for step in steps] == [{"ResponseError": 2}] * 4
    assert [step["samples"] for step in steps] == [10] * 4
    assert sum(step["sampler_lost"].get("ServerBusyError", 0) for step in steps) == 8
    assert {tuple(step["rollout_versions"]) for step in steps} == {("0",), ("1",), ("2",), ("3",)}


async def test_a_sampler_synced_every_other_step_is_as_stale_as_the_run_log_says(folders, teacher, sampler, tmp_path):
    table = {"kind": "server", "url": sampler.url, "sync_every": 2, "alarm_kl": 1e-30}
    await train(run_config(folders, teacher, sampler, sampler=table), tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert [step["rollout_versions"] for step in steps] == [["0"], ["0"], ["2"], ["2"]]
    assert [step["staleness"] for step in steps] == [0, 1, 0, 1]
    assert [step["mismatch_kl"] is None for step in steps] == [False, True, False, True]
    assert [step["sampler_version"] for step in steps] == ["0", "2", "2", "4"]
    events = read_metrics(tmp_path / "run" / "metrics.jsonl", "event")
    sounded = [(event["step"], event["value"] < 1e-6) for event in events if event.get("alarm") == "sync_kl"]
    assert sounded == [(0, True)], "rounding is above such a limit at every push, and the alarm sounds once"


async def test_a_server_that_keeps_its_old_head_is_told_within_two_pushes_though_it_is_near(
    folders, teacher, sampler, tmp_path, monkeypatch
):
    """vLLM on CPU does so with tied embeddings: the head's packed copy is not made anew by a reload."""
    heads, real = [], sync.merge_adapter

    def with_the_first_head(model):
        whole = copy.deepcopy(real(model))
        heads.append(whole.lm_head.weight.detach().clone())
        whole.lm_head.weight = torch.nn.Parameter(heads[0])
        return whole

    monkeypatch.setattr(sync, "merge_adapter", with_the_first_head)
    await train(run_config(folders, teacher, sampler), tmp_path / "run")
    events = read_metrics(tmp_path / "run" / "metrics.jsonl", "event")
    [alarm] = [event for event in events if event.get("alarm") == "sync_kl"]
    assert (alarm["step"] <= 2, alarm["limit"]) == (True, 1e-5)
    assert 1e-5 < alarm["value"] < 0.02, "below what bfloat16 is allowed"


@pytest.mark.slow
async def test_an_sglang_server_is_synced_and_sampled_in_its_own_dialect(folders, teacher, tmp_path):
    with served(folders[0], dialect="sglang") as up:
        await train(run_config(folders, teacher, up, sampler={"kind": "server", "url": up.url}), tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert [step["rollout_versions"] for step in steps] == [["0"], ["1"], ["2"], ["3"]]
    assert all(step["mismatch_kl"] < 1e-6 and step["sync_kl"] < 1e-6 for step in steps)


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ({"weights": "lora"}, ConfigError, r"trains no adapter.*\[student.lora\]"),
        ({"url": "http://127.0.0.1:1"}, ServerUnreachableError, "127.0.0.1:1"),
        ({"model": "nobody"}, ModelNotFoundError, "nobody"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, ConfigError, "NOT_SET_ANYWHERE"),
    ],
)
async def test_a_sampler_that_cannot_be_is_one_clear_line(folders, teacher, sampler, tmp_path, table, error, words):
    table = {"kind": "server", "url": sampler.url} | table
    with pytest.raises(error, match=words):
        await train(run_config(folders, teacher, sampler, sampler=table), tmp_path / "run")


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({}, r"cannot load new weights.*no route /pause.*VLLM_SERVER_DEV_MODE=1"),
        ({"lora": {"r": 4}}, r"cannot load adapters.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
async def test_a_server_that_takes_no_weights_is_refused_before_a_model_is_opened(
    folders, teacher, tmp_path, student, words
):
    async with FaultyServer() as fixed:  # speaks vLLM's scoring and sampling routes, none that change anything
        config = run_config(folders, teacher, fixed, student={"model": "/no/model/is/opened"} | student)
        with pytest.raises(UnsupportedError, match=words):
            await check_sampler(config)


async def test_a_stopped_cached_run_goes_on_and_asks_the_sampler_only_for_what_is_new(
    folders, teacher, sampler, tmp_path
):
    def cached(where, steps):
        return run_config(
            folders, teacher, sampler, steps=steps, cache={"path": str(tmp_path / "caches" / where)}, max_staleness=1
        )

    await train(cached("whole", 4), tmp_path / "whole")
    await train(cached("parts", 2), tmp_path / "parts")
    await train(cached("parts", 4), tmp_path / "again")
    whole, again = steps_of(tmp_path / "whole"), steps_of(tmp_path / "again")
    assert [step["rollout_versions"] for step in again] == [step["rollout_versions"] for step in whole]
    for name in ("loss", "grad_norm", "kl_k1"):  # how a server batches its draws moves the last digits
        assert [step[name] for step in again] == pytest.approx([step[name] for step in whole], rel=1e-4), name
    (account,) = [e for e in read_metrics(tmp_path / "again" / "metrics.jsonl", "event") if e["event"] == "cached"]
    assert account["rollouts"]["hits"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full weights", "adapters"])
async def test_a_stopped_run_is_resumed_on_the_weights_of_its_checkpoint(folders, teacher, sampler, tmp_path, lora):
    student = {"lora": {"r": 4}} if lora else {}

    def steps(count):
        return run_config(folders, teacher, sampler, steps=count, student=student, checkpoint={"every": 2})

    await train(steps(5), tmp_path / "whole")
    await train(steps(2), tmp_path / "parts")
    await train(steps(5), tmp_path / "parts", resume=True)
    whole, parts = steps_of(tmp_path / "whole"), steps_of(tmp_path / "parts")
    assert [step["rollout_versions"] for step in parts] == [step["rollout_versions"] for step in whole]
    assert [step["sampler_version"] for step in parts] == ["1", "2", "3", "4", "5"]
    for name in ("loss", "grad_norm", "kl_k1"):
        assert [step[name] for step in parts] == pytest.approx([step[name] for step in whole], rel=1e-3), name
    async with VllmWeightSink(sampler.url) as sink:
        assert (await sink.server_info()).models == ("student",), "no adapter is left behind"
