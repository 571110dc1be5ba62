"""``--resume``: the same folder, config and run log go on; what cannot go on is refused in one line."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.dry_run import dry_run
from topkd.compose.progress import Progress
from topkd.compose.replay import replay
from topkd.compose.run.folder import lock_folder
from topkd.compose.train import train
from topkd.engine.loop.metrics import drop_timings, read_metrics
from topkd.topk.errors import ConfigError, DataError, TrainingError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": [5 + i, 9], "id": i}) + "\n" for i in range(24)))
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2), data


def run_config(folders, **changes):
    values = {
        "steps": 6,
        "seed": 1,
        "student": {"model": str(folders[0]), "device": "cpu"},
        "teacher": {"kind": "local", "model": str(folders[1])},
        "data": {"path": str(folders[2])},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 1, "max_completion_tokens": 6},
        "learner": {"lr": 3e-3},
        "checkpoint": {"every": 2},
    }
    return RunConfig.model_validate(values | changes)


class Ear(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def told(out, kind="step"):
    return [drop_timings(record) for record in read_metrics(out / "metrics.jsonl", kind)]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    asyncio.run(train(run_config(folders), out))
    return out


async def test_a_finished_run_has_nothing_to_resume_and_more_steps_go_on(folders, finished, tmp_path):
    before = (finished / "metrics.jsonl").read_bytes()
    result = await train(run_config(folders), finished, resume=True)
    assert result.already
    assert [record["step"] for record in result.steps] == [*range(1, 7)]
    assert (finished / "metrics.jsonl").read_bytes() == before

    result = await train(run_config(folders, steps=8), finished, resume=True)
    assert not result.already
    assert [record["step"] for record in told(finished)] == [*range(1, 9)]
    assert [record["step"] for record in result.steps] == [*range(1, 9)]
    assert [record["staleness"] for record in told(finished)] == [0, 1, 1, 1, 1, 1, 0, 1]
    assert json.loads((finished / "config.json").read_text())["steps"] == 8
    assert json.loads((finished / "student" / "topkd.json").read_text())["version"] == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, ["seed 1 -> 2"]),
        ({"learner": {"lr": 1e-3}, "k": 10}, ["k 20 -> 10", "learner.lr 0.003 -> 0.001"]),
        ({"steps": 3}, ["steps 6 -> 3"]),
        ({"objective": {"kind": "gjs"}}, ["objective.kind 'topk_pg' -> 'gjs'"]),
    ],
    ids=["seed", "two keys", "fewer steps", "objective"],
)
async def test_a_changed_config_is_refused_by_its_keys(folders, tmp_path, changes, words):
    (tmp_path / "config.json").write_text(run_config(folders).model_dump_json())
    with pytest.raises(ConfigError) as caught:
        await train(run_config(folders, **changes), tmp_path, resume=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


async def test_a_run_does_not_go_on_with_other_prompts_under_the_same_name(folders, tmp_path):
    """A word more in one row, and rows in another order, are other prompts; the former file back is none."""
    data, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    lines = folders[2].read_text().splitlines()
    data.write_text("\n".join(lines))
    config = run_config((*folders[:2], data), steps=4)
    await train(run_config((*folders[:2], data), steps=2), out)
    left = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "config.json", "tokens.jsonl")}
    for changed in (lines[:-1], lines[::-1], [lines[0].replace('"id": 0', '"id": 0, "hint": "so"'), *lines[1:]]):
        data.write_text("\n".join(changed))
        with pytest.raises(
            DataError, match=r"not those that the run began with.*got \d+ rows.*expected 24 rows"
        ) as told_:
            await train(config, out, resume=True)
        assert "\n" not in str(told_.value)
        found = await dry_run(config, out=out, resume=True)
        assert any("not those that the run began with" in problem for problem in found.problems)
        assert {name: (out / name).read_bytes() for name in left} == left, "a refusal costs nothing"
    data.write_text("\n".join(lines) + "\n\n")
    assert not (await dry_run(config, out=out, resume=True)).problems
    await train(config, out, resume=True)
    assert [record["step"] for record in told(out)] == [1, 2, 3, 4]


async def test_where_servers_are_and_how_they_are_asked_may_change(folders, tmp_path):
    before = run_config(folders, teacher={"url": "http://127.0.0.1:1"}).model_dump_json()
    (tmp_path / "config.json").write_text(before)
    now = run_config(folders, teacher={"url": "http://127.0.0.1:2"}, client={"max_retries": 0}, checkpoint={"keep": 9})
    with pytest.raises(OSError, match=r"127\.0\.0\.1:2"):  # it got as far as asking the new address
        await train(now, tmp_path, resume=True)


async def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(folders, tmp_path):
    out = tmp_path / "run"
    await train(run_config(folders), out)
    whole = told(out)
    (out / "student" / "topkd.json").unlink()  # as if the process had died while it saved the student
    weights = out / "checkpoints" / "step-00000006" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with (out / "metrics.jsonl").open("a") as run_log:
        run_log.write('{"kind": "step", "st')  # torn
    ear = Ear()
    await train(run_config(folders), out, ear, resume=True)
    assert "checkpoint step-00000006 is not used: weights.safetensors has another size or checksum" in ear.notes[0]
    assert "resuming after step 4" in ear.notes[1]
    assert json.dumps(told(out)) == json.dumps(whole)
    starts = [event for event in told(out, "event") if event["event"] in {"start", "resumed"}]
    assert [(event["event"], event.get("step")) for event in starts] == [("start", None), ("resumed", 4)]
    transcripts = out / "tokens.jsonl"
    if transcripts.exists():
        steps = [json.loads(line)["step"] for line in transcripts.read_text().splitlines()]
        assert steps == sorted(steps)


async def test_without_a_checkpoint_a_run_starts_over_and_says_so(folders, tmp_path):
    (tmp_path / "config.json").write_text(run_config(folders, steps=1).model_dump_json())
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event", "event": "start"}\n')
    ear = Ear()
    await train(run_config(folders, steps=1), tmp_path, ear, resume=True)
    assert "no checkpoint yet: starting from the beginning" in ear.notes
    assert [record["step"] for record in told(tmp_path)] == [1]
    assert told(tmp_path, "event")[0]["event"] == "resumed"


async def test_what_cannot_be_resumed_is_one_line(folders, tmp_path):
    with pytest.raises(ConfigError, match="there is no run to resume"):
        await train(run_config(folders), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    out = tmp_path / "run"
    await train(run_config(folders, steps=2), out)
    with lock_folder(out), pytest.raises(ConfigError, match="another process is at work"):
        await train(run_config(folders, steps=3), out, resume=True)
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        await train(run_config(folders, steps=2), out)
    (out / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="shorter than at the checkpoint"):
        await train(run_config(folders, steps=3), out, resume=True)
    (out / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):  # its checkpoints would be taken for the new run's
        await train(run_config(folders, steps=2), out)


@pytest.mark.parametrize(
    ("full", "message", "lost"),
    [
        (
            "topkd.engine.loop.metrics.MetricsLog.write",
            r"cannot write the run's files \(.*run\): got No space.*--resume",
            False,
        ),
        (
            "topkd.engine.checkpoint.checkpoint.save_tensors",
            r"cannot write the folder \(.*step-00000004\): got No space",
            True,
        ),
    ],
    ids=["run log", "checkpoint and student"],
)
async def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_once_there_is_room(
    folders, finished, tmp_path, monkeypatch, full, message, lost
):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out, ear = tmp_path / "run", Ear()
    heard, ear.record = [], lambda kind, record: record["step"] == 3 and (heard.append(kind), fill())

    def fill():
        monkeypatch.setattr(full, no_room)
        if lost:
            monkeypatch.setattr("topkd.engine.checkpoint.checkpoint.save_student", no_room)

    with pytest.raises(TrainingError, match=message) as caught:
        await train(run_config(folders), out, ear)
    assert (heard, caught.value.exit_code) == (["step"], 1)
    assert any(note.startswith("the student so far could not be saved: ") for note in ear.notes)
    monkeypatch.undo()
    await train(run_config(folders), out, resume=True)
    assert told(out) == told(finished)[:6]


async def test_a_replay_is_resumed_by_replay(folders, tmp_path):
    config = run_config(folders, cache={"path": str(tmp_path / "cache")})
    recorded = await train(config, tmp_path / "live")
    out = tmp_path / "replayed"
    await replay(config, out)
    (out / "student" / "topkd.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    with pytest.raises(ConfigError, match="made by topkd replay"):
        await train(config, out, resume=True)
    result = await replay(config, out, resume=True)
    assert json.dumps([drop_timings(record) for record in result.steps]) == json.dumps(told_plain(out))
    assert [record["loss"] for record in result.steps] == [record["loss"] for record in recorded.steps]


def told_plain(out):
    return [{key: value for key, value in record.items() if key != "kind"} for record in told(out)]


async def test_a_run_tells_what_it_was_made_with(folders, finished):
    event = read_metrics(finished / "metrics.jsonl", "event")[0]
    assert event["event"] == "start"
    assert {"torch", "transformers", "numpy", "safetensors"} <= event["packages"].keys()
    assert (event["device"], event["threads"] > 0) == ("cpu", True)
    assert {"topkd", "revision", "project_revision", "python", "platform"} <= event.keys()
    assert event["teachers"][""]["model"] == folders[1].name
    assert RunConfig.model_validate_json((finished / "config.json").read_text()).seed == 1


def command(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "topkd", "train", "run.toml", "--out", "run", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def signalled(process, run_log, steps, number):
    deadline = time.monotonic() + 240
    while not run_log.exists() or run_log.read_bytes().count(b'{"kind": "step"') < steps:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.slow
async def test_signals_stop_a_run_in_order_and_it_ends_as_if_they_had_not(folders, tmp_path):
    config = run_config(folders, steps=80, max_staleness=2, checkpoint={"every": 30})
    await train(config, tmp_path / "whole")
    (tmp_path / "run.toml").write_text(
        f'steps = 80\nseed = 1\nmax_staleness = 2\n[student]\nmodel = "{folders[0]}"\ndevice = "cpu"\n'
        f'[teacher]\nkind = "local"\nmodel = "{folders[1]}"\n[data]\npath = "{folders[2]}"\n'
        "[rollout]\nprompts_per_step = 6\nsamples_per_prompt = 1\nmax_completion_tokens = 6\n"
        "[learner]\nlr = 3e-3\n[checkpoint]\nevery = 30\n"
    )
    run_log = tmp_path / "run" / "metrics.jsonl"
    code, out, err = signalled(command(tmp_path), run_log, 5, signal.SIGTERM)
    assert (code, out) == (0, "")
    assert "SIGTERM: stopped after step" in err
    assert "resume with: topkd train run.toml --out run --resume" in err
    taken = len(told(tmp_path / "run"))
    assert 5 <= taken < 80
    assert (tmp_path / "run" / "checkpoints" / f"step-{taken:08d}" / "manifest.json").exists()
    assert (
        told(tmp_path / "run", "event")[-1] | {"version": taken, "reason": "SIGTERM"}
        == told(tmp_path / "run", "event")[-1]
    )

    code, _, err = signalled(command(tmp_path, "--resume"), run_log, taken + 5, signal.SIGINT)
    assert code == 130
    assert f"resuming after step {taken}" in err
    assert "Traceback" not in err

    done = command(tmp_path, "--resume")
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert "80 steps done" in out
    assert json.dumps(told(tmp_path / "run")) == json.dumps(told(tmp_path / "whole"))
    again = command(tmp_path, "--resume")
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0
    assert "is finished: 80 steps; nothing to resume" in err
