"""``topkd train`` under torchrun: two processes end where one does, stop together, and go on together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.pieces import model_folder
from topkd.engine.loop.metrics import drop_timings, read_metrics
from topkd.serve import ServeConfig, ServerProcess

STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    model_folder(root / "student", seed=1)
    model_folder(root / "teacher", seed=2)
    rows = "".join(json.dumps({"prompt_ids": [5 + i, 9], "id": i}) + "\n" for i in range(24))
    (root / "prompts.jsonl").write_text(rows)
    (root / "run.toml").write_text(f"""
steps = {STEPS}
seed = 1
[student]
model = "student"
device = "cpu"
[teacher]
kind = "local"
model = "teacher"
[data]
path = "prompts.jsonl"
[rollout]
prompts_per_step = 7
samples_per_prompt = 2
max_completion_tokens = 6
shards = 2
[learner]
lr = 1e-3
[checkpoint]
every = 2
""")
    return root


def topkd(files, *words, processes=1, **more):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "topkd", "train", "run.toml", *words],
        cwd=files, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **more,
    )  # fmt: skip


def done(process):
    out, err = process.communicate(timeout=840)
    assert process.returncode == 0, err[-3000:]
    return out, err


def run_log(folder, kind="step"):
    return [drop_timings(record) for record in read_metrics(folder / "metrics.jsonl", kind)]


def check_two_end_where_one_does(files, name, *settings):
    """Train with one process and with two, and compare records and weights."""
    done(topkd(files, "--out", f"one-{name}", *settings))
    out, _ = done(topkd(files, "--out", f"two-{name}", *settings, processes=2))
    assert out.count("steps done") == 1  # one of them speaks
    alone, shared = run_log(files / f"one-{name}"), run_log(files / f"two-{name}")
    assert [record["step"] for record in shared] == [*range(1, STEPS + 1)]
    for mine, other in zip(alone, shared, strict=True):
        assert mine.keys() - {"grad_noise"} == other.keys() - {"grad_noise"}
        assert (mine["tokens"], mine["samples"]) == (other["tokens"], other["samples"]) == (mine["tokens"], 14)
        for key in {"loss", "kl_k1", "grad_norm", "ess", "teacher_mass", "tail_mass", "realised_in_topk"} & mine.keys():
            assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), (mine["step"], key)
    weights = [load_file(files / f"{number}-{name}" / "student" / "model.safetensors") for number in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-5)
    return alone


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_end_where_one_does(files, strategy):
    records = check_two_end_where_one_does(files, strategy, "--set", f"learner.strategy={strategy}")
    assert {"loss", "kl_k1", "grad_norm", "ess", "teacher_mass", "tail_mass", "realised_in_topk"} <= records[0].keys()


@pytest.mark.slow
def test_a_custom_objective_ends_where_it_does_with_one_process(files):
    (files / "losses.py").write_text("def surprise(view):\n    return view.logp_new.exp() * view.logp_new\n")
    check_two_end_where_one_does(files, "custom", "--set", "objective.kind=losses:surprise")
    events = [run_log(files / f"{number}-custom", "event")[0] for number in ("one", "two")]
    assert [event["processes"] for event in events] == [1, 2]


@pytest.mark.slow
def test_processes_stop_together_and_go_on_together(files):
    whole, parts = files / "whole", files / "parts"
    more = ("--set", "steps=40", "--set", "learner.strategy=fsdp2", "--set", "max_staleness=0")
    done(topkd(files, "--out", "whole", *more, processes=2))
    launched = topkd(files, "--out", "parts", *more, processes=2)
    deadline = time.monotonic() + 240
    while not (parts / "metrics.jsonl").exists() or len(read_metrics(parts / "metrics.jsonl", "step")) < 5:
        assert time.monotonic() < deadline
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.02)
    launched.send_signal(signal.SIGTERM)  # torchrun passes it on
    launched.communicate(timeout=240)
    stopped = run_log(parts, "event")[-1]
    assert stopped["event"] == "stopped"
    assert 5 <= stopped["version"] < 40
    done(topkd(files, "--out", "parts", *more, "--resume", processes=2))
    assert run_log(parts, "event")[-1]["step"] == stopped["version"]
    assert json.dumps(run_log(parts)) == json.dumps(run_log(whole))


@pytest.mark.slow
def test_what_a_step_asked_its_teacher_is_counted_over_all_processes(files):
    with ServerProcess(ServeConfig(model=str(files / "teacher"), served_model_name="teacher", port=0)) as server:
        served = ["--set", "steps=3", "--set", "teacher.kind=server", "--set", f"teacher.url={server.url}"]
        done(topkd(files, "--out", "served", *served, "--set", "teacher.model=teacher", processes=2))
    steps = read_metrics(files / "served" / "metrics.jsonl", "step")
    assert sum(step["scored_tokens"] for step in steps) == sum(step["completion_tokens"] for step in steps)
    assert sum(step["requests"] for step in steps) == sum(step["samples"] for step in steps) == 3 * 14


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_is_killed_ends_the_run_with_one_line_and_the_command_that_goes_on(files):
    launched = topkd(files, "--out", "killed", "--set", "steps=100000", processes=2)
    run_log_file, deadline = files / "killed" / "metrics.jsonl", time.monotonic() + 240
    while not run_log_file.exists() or len(read_metrics(run_log_file, "step")) < 5:
        assert time.monotonic() < deadline
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.02)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children")
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children.read_text().split()}
    [second] = [pid for pid, environment in environments.items() if b"\0RANK=1\0" in environment]
    os.kill(second, signal.SIGKILL)
    _, err = launched.communicate(timeout=240)
    assert launched.returncode == 1
    assert "internal error" not in err
    assert "topkd: error: another process of this run is gone, or does not answer (process 0 of 2)" in err
    again = "torchrun --nproc-per-node 2 -m topkd train run.toml --out killed --set steps=100000 --resume"
    assert f"resume with: {again}" in err


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_number_of_processes_is_told_what_that_changes(files):
    more = ("--out", "fewer", "--set", "rollout.shards=0", "--set", "steps=2")
    done(topkd(files, *more))
    _, err = done(topkd(files, *more[:-1], "steps=3", "--resume"))
    assert "processes before" not in err
    run_log_file = files / "fewer" / "metrics.jsonl"
    run_log_file.write_text(run_log_file.read_text().replace('"processes": 1', '"processes": 2'))
    _, err = done(topkd(files, *more[:-1], "steps=4", "--resume"))
    assert "careful: torchrun had 2 processes before and has 1 now: completions get other seeds" in err
