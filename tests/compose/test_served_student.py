"""The student sampled from a server: what was pushed is what is sampled from, step by step, or the run ends."""

import json

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.clients import VllmGenerate
from topkd.compose.config import RunConfig
from topkd.compose.train import train
from topkd.engine.local_teacher import LocalTeacher
from topkd.engine.metrics import read_metrics
from topkd.engine.student import Student
from topkd.serve import ServeConfig, ServerProcess


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


def run_config(folders, teacher, sampler, **changes):
    values = {
        "steps": 4,
        "seed": 1,
        "max_staleness": 0,
        "student": {"model": str(folders[0]), "device": "cpu"},
        "teacher": {"url": teacher.url},
        "data": {"path": str(folders[2])},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 2, "max_completion_tokens": 8},
        "learner": {"lr": 3e-3},
        "client": {"max_retries": 2, "total_timeout_s": 20.0, "backoff_s": 0.1},
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
