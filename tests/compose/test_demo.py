"""The demo with its sizes turned down: every part of it, from corpus to curve, on one run."""

import asyncio
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from topkd.compose import demo
from topkd.compose.config.run_config import load_config
from topkd.compose.demo_assets import assets
from topkd.compose.demo_assets.folders import open_demo_folder, open_scratch_folder
from topkd.compose.progress import Progress
from topkd.compose.run.folder import lock_folder
from topkd.compose.run.signals import StopSignals
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


class Told(Progress):
    def __init__(self):
        self.notes, self.stages, self.kinds = [], [], []

    def note(self, text):
        self.notes.append(text)

    def stage(self, name, total):
        self.stages.append((name, total))

    def record(self, kind, record):
        self.kinds.append(kind)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(assets, "CORPUS_BYTES", 300_000)
    monkeypatch.setattr(assets, "HELD_OUT_TOKENS", 5_000)
    monkeypatch.setattr(demo, "PROBES", 8)
    monkeypatch.setattr(assets, "TEACHER", {"hidden": 32, "layers": 1, "heads": 2, "steps": 12, "batch": 4})
    monkeypatch.setattr(assets, "STUDENT", {"hidden": 32, "layers": 1, "heads": 2, "steps": 2, "seed": 1, "batch": 4})


async def test_the_demo_runs_from_corpus_to_curve_and_reuses_what_it_trained(small, tmp_path):
    told, out = Told(), tmp_path / 'a "b" \U0001f680'  # as a run file quotes it, too
    first = await demo.demo("gjs", steps=3, seed=1, out=out, cache=tmp_path / "cache", progress=told)
    assert told.stages == [("train the teacher", 12), ("train the student", 2), ("distil", 3)]
    assert told.kinds.count("step") == 3
    assert first.figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.tokens == sum(record["tokens"] for record in read_metrics(out / "metrics.jsonl", "step"))
    assert (out / "student" / "model.safetensors").exists()
    summary = json.loads((out / "demo.json").read_text())
    assert summary["before"]["reverse_kl"] == first.before["reverse_kl"] > 0
    folder = first.run_file.parent
    config = load_config(first.run_file, ["steps=2", "eval.every=1", "student.device=cpu"])
    assert (config.learner.lr, config.rollout.max_completion_tokens) == (demo.LEARNING_RATE, demo.COMPLETION_TOKENS)
    with ServerProcess(ServeConfig(model=str(folder / "teacher"), port=0, device="cpu")) as server:
        teacher = config.teacher.model_copy(update={"url": server.url})
        own = await train(config.model_copy(update={"teacher": teacher}), tmp_path / "own")
    assert [record["step"] for record in own.steps] == [1, 2]
    assert {record["prefixes"] for record in own.evals} == {"fixed", "fresh"}
    assert all(record["reverse_kl"] > 0 for record in own.evals)
    again = Told()
    second = await demo.demo("gjs", steps=3, seed=1, out=tmp_path / "b", cache=tmp_path / "cache", progress=again)
    assert again.stages == [("distil", 3)]
    assert second.after == first.after  # deterministic for a seed, real HTTP in between


async def test_a_demos_folder_is_refused_to_others_while_it_trains(small, tmp_path):
    out, refused = tmp_path / "demo", []

    class Second(Told):
        def record(self, kind, record):
            with pytest.raises(ConfigError) as error, lock_folder(out):
                pass
            refused.append(error.value.what)

    await demo.demo("gjs", steps=1, out=out, cache=tmp_path / "cache", progress=Second())
    assert set(refused) == {"another process is at work on this run"}
    with lock_folder(out):
        pass


def test_the_corpus_is_the_same_every_time_and_a_mixture_from_the_start():
    files = assets.list_library_files(500_000)
    assert files == assets.list_library_files(500_000)
    assert len({path.parent for path in files[:20]}) > 3
    assert sum(path.stat().st_size for path in files) <= 500_000


def test_encoding_and_decoding_lose_nothing(tmp_path):
    texts = assets.read_texts(assets.list_library_files(200_000))
    assets.train_tokenizer(texts, 512, tmp_path)
    from transformers import AutoTokenizer

    ids = assets.encode_texts(texts[:2], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.eos_token
    assert tokenizer.decode(ids) == texts[0] + end + texts[1] + end


@pytest.mark.parametrize("name", ["metrics.jsonl", "demo.json", ".hidden"])
async def test_a_folder_that_holds_anything_is_refused_before_the_work_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty.*choose another"):
        await demo.demo("gjs", steps=1, out=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="is not a folder"):
        await demo.demo("gjs", steps=1, out=tmp_path / name, cache=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_second_demo_goes_beside_the_first_and_says_so(tmp_path):
    usual, told = tmp_path / "runs" / "demo", Told()
    with open_demo_folder(None, usual, told) as first:
        pass
    (first / "run.toml").write_text("mine")
    with open_demo_folder(None, usual, told) as second, open_demo_folder(None, usual, told) as third:
        pass
    assert [path.name for path in (first, second, third)] == ["demo", "demo-2", "demo-3"]
    assert [note.split(": ")[1] for note in told.notes] == [f"this demo writes to {path}" for path in (second, third)]
    assert (first / "run.toml").read_text() == "mine"


def test_what_ends_before_the_run_leaves_no_folder_and_keeps_an_empty_one(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (None, mine):
        with pytest.raises(KeyboardInterrupt), open_demo_folder(out, tmp_path / "runs" / "demo", Told()):
            raise KeyboardInterrupt
    assert list(mine.iterdir()) == list((tmp_path / "runs").iterdir()) == []


def test_a_place_that_can_never_be_had_is_an_error_and_no_search_without_end(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unplugged")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, usual, where in (
        (None, tmp_path / "runs" / "demo", r"runs.demo\): got File exists"),
        (tmp_path / "runs" / "mine", tmp_path / "demo", r"runs.mine\): got File exists"),
        (None, tmp_path / "loop" / "demo", r"loop.demo\): got Too many levels of symbolic links"),
    ):
        with pytest.raises(ConfigError, match=where), open_demo_folder(out, usual, Told()):
            pass


def test_scratch_of_the_dead_is_cleaned_and_of_the_living_is_waited_for(tmp_path):
    models, dead, told = tmp_path / "demo" / "abc", tmp_path / "demo" / ".abc-killed", Told()
    dead.mkdir(parents=True)
    (dead / "tokenizer").write_text("half")
    release = threading.Event()

    def second():
        with open_scratch_folder(models, told) as staging:
            release.set()
            assert staging.is_dir()

    with open_scratch_folder(models, Told()) as staging:
        assert not dead.exists()
        other = threading.Thread(target=second)
        other.start()
        assert not release.wait(0.3)
        assert staging.is_dir()
    other.join()
    assert told.notes == ["waiting for another process that makes the same models"]
    assert [path.name for path in models.parent.iterdir()] == [".lock"]


async def test_a_demo_that_is_stopped_keeps_what_it_learnt_and_says_no_class_of_python(small, tmp_path):
    class Impatient(Told):
        def record(self, kind, record):
            if kind == "step" and "step" not in self.kinds:  # a second one would interrupt at once
                self.kinds.append(kind)
                os.kill(os.getpid(), signal.SIGINT)

    with StopSignals() as signals:
        result = await demo.demo(
            "gjs", steps=50, out=tmp_path / "a", cache=tmp_path / "cache", progress=Impatient(), signals=signals
        )
    assert (result.stopped, result.out) == ("SIGINT", tmp_path / "a")
    assert 1 <= len(result.steps) < 50
    assert (tmp_path / "a" / "student" / "model.safetensors").exists()
    cancelled = asyncio.create_task(
        demo.demo("gjs", steps=50, out=tmp_path / "b", cache=tmp_path / "cache", progress=Told())
    )
    while not read_steps(tmp_path / "b" / "metrics.jsonl"):
        await asyncio.sleep(0.01)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    reasons = [read_metrics(tmp_path / name / "metrics.jsonl", "event")[-1]["reason"] for name in "ab"]
    assert reasons == ["SIGINT", "interrupted"]


def read_steps(run_log):
    return run_log.exists() and b'{"kind": "step"' in run_log.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "most"), [("gjs", 0.9), ("scalar_kl", 0.9)])
async def test_the_demo_as_shipped_brings_the_student_closer(objective, most, tmp_path):
    """The sizes a newcomer gets; the trained models come from (or go to) the user's cache, as for them."""
    result = await demo.demo(objective, seed=1, out=tmp_path / "run")
    assert result.after["reverse_kl"] <= most * result.before["reverse_kl"]


@pytest.mark.slow
def test_make_demo_as_the_readme_has_it_brings_the_student_closer(tmp_path):
    make = ["make", "demo", f"DEMO_ARGS=--json --out {tmp_path / 'run'}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["after"]["reverse_kl"] <= 0.75 * result["before"]["reverse_kl"]
    assert result["after"]["agreement"] > result["before"]["agreement"]
