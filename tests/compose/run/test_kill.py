"""kill -9 at any moment costs time, never a number: the resumed run ends as the uninterrupted one does."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.train import train
from topkd.engine.loop.metrics import drop_timings, read_metrics
from topkd.serve import ServeConfig, ServerProcess

KILLS, STEPS = 30, 110
ROOT = Path(__file__).parents[3]


def run_config(folders, url, cache):
    return RunConfig.model_validate(
        {
            "steps": STEPS,
            "seed": 1,
            "student": {"model": str(folders[0]), "device": "cpu"},
            "teacher": {"url": url, "dialect": "vllm"},
            "data": {"path": str(folders[2])},
            "max_staleness": 2,
            "rollout": {"prompts_per_step": 6, "samples_per_prompt": 1, "max_completion_tokens": 6},
            "learner": {"lr": 3e-3, "warmup_steps": 20},
            "checkpoint": {"every": 2},
            "cache": {"path": str(cache)},
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": [5 + i, 9], "id": i}) + "\n" for i in range(24)))
    return model_folder(root / "student", seed=1, hidden=16), model_folder(root / "teacher", seed=2, hidden=16), data


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_thirty_kills_change_no_number_and_ask_nothing_kept_again(folders, tmp_path):
    # One prompt a forward pass: what a teacher says of a sequence must not depend on who else asks.
    serving = ServeConfig(model=str(folders[1]), served_model_name="teacher", port=0, device="cpu", max_batch_tokens=1)
    with ServerProcess(serving) as server:
        await train(run_config(folders, server.url, tmp_path / "cache-whole"), tmp_path / "whole")
        path = tmp_path / "config.json"
        path.write_text(run_config(folders, server.url, tmp_path / "cache-killed").model_dump_json())
        out = tmp_path / "killed"
        done = subprocess.run(
            [sys.executable, "-m", "tests.compose.run.killed_runs", str(path), str(out), str(KILLS), "7"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1700,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    account = json.loads(done.stdout)
    assert account["killed"] == KILLS
    assert account["faults"] == []  # whatever has a checkpoint's name is whole
    assert "is not used" not in done.stderr

    whole, killed = (
        [drop_timings(record) for kind in ("step", "eval") for record in read_metrics(folder / "metrics.jsonl", kind)]
        for folder in (tmp_path / "whole", out)
    )
    assert [record["step"] for record in killed] == [*range(1, STEPS + 1)]
    assert killed == whole
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (tmp_path / "whole", out)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])

    asked, kept = Counter(), set()
    for line in out.with_suffix(".log").read_text().splitlines():
        what, key = line.split()
        if what == "asked":
            assert key not in kept, "a score that was on disk has been asked for again"
            asked[key] += 1
        else:
            kept.add(key)
    assert asked.keys() == kept
    repeated = asked.total() - len(asked)
    print(f"{account}; {len(asked)} scores, {repeated} asked again because they were in flight when the process died")
    assert repeated <= KILLS * 3 * 6  # at most what the three batches in flight hold, each time
