"""``topkd train`` with in-process vLLM beside the learner: the wheel's own venv, a real engine, real syncs."""

from __future__ import annotations

import json
import site
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import Models, need_vllm
from tests.contract.servers import ROOT, VLLM_PYTHON, Endpoint, embedded_server, vllm_env
from tests.contract.wire import token_ids
from topkd.engine.loop.metrics import read_metrics

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    log = tmp_path_factory.mktemp("teacher") / "server.log"
    with embedded_server(models.updated, model="teacher", log=log, max_logprobs=20, max_model_len=256) as up:
        yield up


@pytest.mark.parametrize("lora", [False, True], ids=["full weights", "adapters"])
def test_each_step_is_sampled_by_the_engine_beside_the_learner(
    models: Models, teacher: Endpoint, tmp_path: Path, lora: bool
):
    need_vllm()
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": token_ids(20 + i, seed=i)}) + "\n" for i in range(8)))
    student: dict[str, Any] = {"model": str(models.policy), "device": "cpu"}
    config = {
        "steps": 3,
        "max_staleness": 0,
        "student": student | ({"lora": {"r": 4, "alpha": 8.0}} if lora else {}),
        "teacher": {"url": teacher.url},
        "data": {"path": str(data)},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_completion_tokens": 16},
        "learner": {"lr": 3e-3},
        "sampler": {"kind": "vllm", "max_model_len": 128, "enforce_eager": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = [
        str(VLLM_PYTHON),
        str(Path(__file__).with_name("inprocess_run.py")),
        str(ROOT),
        site.getsitepackages()[0],
    ]
    done = subprocess.run(
        [*program, str(tmp_path / "config.json"), str(tmp_path / "run")],
        env=vllm_env(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    assert [step["rollout_versions"] for step in steps] == [["0"], ["1"], ["2"]]
    for step in steps:
        assert step["sync_kl"] < 1e-6
        assert step["mismatch_kl"] < 1e-6
        assert (step["lost"], step["sampler_lost"], step["skipped"]) == ({}, {}, "")
    assert steps[0]["kl_k1"] != steps[-1]["kl_k1"]
