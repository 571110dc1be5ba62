"""The main job over real HTTP: a served teacher, a student that gets better, and every way the run can fail."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.engine.models.divergences import Probe, exact_divergences
from topkd.engine.models.student import Student
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import (
    AuthError,
    ConfigError,
    DataError,
    KLimitError,
    ModelNotFoundError,
    ServerUnreachableError,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": [5 + i, 9], "id": i}) + "\n" for i in range(24)))
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2), data


@pytest.fixture(scope="module")
def server(folders):
    config = ServeConfig(model=str(folders[1]), served_model_name="teacher", port=0, max_logprobs=20, device="cpu")
    with ServerProcess(config) as running:
        yield running


def run_config(folders, url, **changes):
    values = {
        "steps": 60,
        "seed": 1,
        "student": {"model": str(folders[0]), "device": "cpu"},
        "teacher": {"url": url},
        "data": {"path": str(folders[2])},
        "objective": {"kind": "topk_pg"},
        "rollout": {"prompts_per_step": 12, "samples_per_prompt": 1, "max_completion_tokens": 8},
        "learner": {"lr": 3e-3},
        "client": {"max_retries": 2, "total_timeout_s": 120.0, "backoff_s": 0.1},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key != "objective" else value
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("kind", ["topk_pg", "gjs", "scalar_kl"])
async def test_a_student_gets_closer_to_a_served_teacher(folders, server, tmp_path, kind):
    result = await train(run_config(folders, server.url, objective={"kind": kind}), tmp_path / "run")
    probes = [Probe(np.array([5 + i, 9, 30 + i, 40, 50]), 2) for i in range(24)]
    teacher = Student.load(str(folders[1]), "cpu")
    before = exact_divergences(Student.load(str(folders[0]), "cpu"), teacher, probes)
    after = exact_divergences(Student.load(str(tmp_path / "run" / "student"), "cpu"), teacher, probes)
    assert after["reverse_kl"] < 0.9 * before["reverse_kl"]
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert {record["divergence_mode"] for record in steps} == {kind}
    assert all(record["lost"] == {} and record["missing_tokens"] == 0 for record in steps)
    assert all(record["version"] == record["step"] for record in steps)
    assert result.steps[-1]["tokens"] == 12 * 8


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"teacher": {"model": "nobody"}}, ModelNotFoundError, ["nobody", "teacher"]),
        ({"k": 21}, KLimitError, ["21", "20"]),
        ({"teacher": {"url": "http://127.0.0.1:1"}}, ServerUnreachableError, ["http://127.0.0.1:1"]),
        ({"teacher": {"url": "ftp://x"}}, ConfigError, ["ftp://x"]),
        ({"student": {"model": "/no/such/folder"}}, ConfigError, ["/no/such/folder"]),
        ({"data": {"path": "/no/such/file"}}, DataError, ["/no/such/file"]),
    ],
    ids=["wrong model", "K above the limit", "dead server", "wrong url", "no student", "no data"],
)
async def test_bad_input_is_one_line_that_names_what_is_wrong(folders, server, tmp_path, changes, error, words):
    with pytest.raises(error) as caught:
        await asyncio.wait_for(train(run_config(folders, server.url, **changes), tmp_path / "run"), timeout=240)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


async def test_a_wrong_key_is_refused_and_not_repeated_in_the_error(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("RIGHT", "right-secret")
    monkeypatch.setenv("WRONG", "wrong-secret")
    config = ServeConfig(
        model=str(folders[1]), served_model_name="teacher", port=0, api_key="right-secret", device="cpu"
    )
    with ServerProcess(config) as running:
        with pytest.raises(AuthError) as caught:
            await train(run_config(folders, running.url, teacher={"api_key_env": "WRONG"}), tmp_path / "bad")
        await train(run_config(folders, running.url, steps=1, teacher={"api_key_env": "RIGHT"}), tmp_path / "good")
    assert "secret" not in str(caught.value)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(b"-secret" in data for data in written)


def test_killing_the_teacher_in_mid_run_ends_it_with_one_error_within_its_time_out(folders, tmp_path):
    config = ServeConfig(model=str(folders[1]), served_model_name="teacher", port=0, device="cpu")
    with ServerProcess(config) as running:
        path = tmp_path / "run.json"
        values = run_config(folders, running.url, steps=100_000).model_dump(mode="json", exclude={"teachers"})
        path.write_text(json.dumps(values))
        program = (
            "import asyncio, json, sys\nfrom pathlib import Path\nfrom topkd.cli.app import main\n"
            "from topkd.compose.config.run_config import RunConfig\nfrom topkd.compose.train import train\n"
            "import topkd.cli.app as cli\n"
            "cli.app = lambda **_: asyncio.run(train(RunConfig.model_validate_json(Path(sys.argv[1]).read_text()), "
            "Path(sys.argv[2])))\nmain()\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
        )
        run_log = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not (run_log.exists() and len(read_metrics(run_log, "step")) >= 2):
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.2)
        os.kill(running.pid, signal.SIGKILL)
        _, stderr = child.communicate(timeout=240)
    lines = [line for line in stderr.splitlines() if line.startswith("topkd: error:")]
    assert child.returncode == 1
    assert len(lines) == 1, stderr
    assert running.url in lines[0]
    assert "Traceback" not in stderr
    stopped = read_metrics(run_log, "event")[-1]
    state = json.loads((tmp_path / "out" / "student" / "topkd.json").read_text())
    assert stopped["event"] == "stopped"
    assert state["version"] == stopped["version"] == len(read_metrics(run_log, "step"))  # what was learnt is kept
    assert state["stopped"] is True


async def test_a_mistake_found_before_the_first_step_does_not_use_up_the_folder(folders, server, tmp_path):
    with pytest.raises(KLimitError):
        await train(run_config(folders, server.url, steps=1, k=21), tmp_path / "run")
    await train(run_config(folders, server.url, steps=1), tmp_path / "run")
    assert [record["event"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "event")][:1] == ["start"]


async def test_a_folder_that_holds_a_run_is_not_written_over(folders, server, tmp_path):
    config = run_config(folders, server.url, steps=1)
    await train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        await train(config, tmp_path / "run")


async def test_a_folder_of_something_else_is_left_as_it_is(folders, server, tmp_path):
    """A model's folder as --out would lose its config.json to the run's, and a working folder its student."""
    copy = shutil.copytree(folders[0], tmp_path / "model")
    before = {entry.name: entry.read_bytes() for entry in copy.iterdir()}
    config = run_config(folders, server.url, steps=1)
    with pytest.raises(ConfigError, match=r"holds files that are not a run's \(.*model\): got .*config.json"):
        await train(config, copy)
    with pytest.raises(ConfigError, match="output folder is a file"):
        await train(config, copy / "config.json")
    assert {entry.name: entry.read_bytes() for entry in copy.iterdir()} == before
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len((await train(config, empty)).steps) == 1
