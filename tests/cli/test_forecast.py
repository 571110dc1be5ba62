"""What ``--dry-run`` says of a run's traffic, against the bytes that the run then receives."""

import json

import pytest

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.dry_run import dry_run
from topkd.compose.train import train
from topkd.serve import ServeConfig, ServerProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("forecast")
    model_folder(root / "student", seed=1)
    lines = [{"prompt_ids": [5 + row, *range(20, 68)]} for row in range(4)]  # longer than what the student adds
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def urls(folder):
    """A server of each family of dialects."""
    base = ServeConfig(model=str(folder / "student"), served_model_name="t", port=0, max_logprobs=20, device="cpu")
    with ServerProcess(base) as vllm, ServerProcess(base.model_copy(update={"dialect": "sglang"})) as sglang:
        yield {"vllm": vllm.url, "vllm_generate": vllm.url, "sglang": sglang.url}


@pytest.mark.parametrize(("dialect", "k"), [("vllm", 20), ("vllm_generate", 1), ("sglang", 20)])
async def test_replies_are_as_large_as_forecast_in_every_dialect(folder, urls, tmp_path, monkeypatch, dialect, k):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = RunConfig.model_validate(
        {
            "steps": 1,
            "k": k,
            "student": {"model": str(folder / "student"), "device": "cpu"},
            "teacher": {"url": urls[dialect], "dialect": dialect},
            "data": {"path": str(folder / "data.jsonl")},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_completion_tokens": 24},
        }
    )
    found = await dry_run(config)
    assert found.problems == []
    run = await train(config, tmp_path / "run")
    received = run.steps[0]["teacher_bytes"]
    assert received / 1.5 < found.forecast.teacher_reply_bytes_per_step < 1.5 * received
    assert run.steps[0]["requests"] == found.forecast.teacher_requests_per_step
