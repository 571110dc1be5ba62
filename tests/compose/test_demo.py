"""The demo with its sizes turned down: every part of it, from corpus to curve, on one run."""

import json

import pytest

from topkd.compose import corpus, demo
from topkd.compose.config import load_config
from topkd.compose.progress import Progress
from topkd.compose.train import train
from topkd.engine.metrics import read_metrics
from topkd.serve import ServeConfig, ServerProcess
from topkd.topk.errors import ConfigError


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
    monkeypatch.setattr(demo, "CORPUS_BYTES", 300_000)
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 5_000)
    monkeypatch.setattr(demo, "PROBES", 8)
    monkeypatch.setattr(demo, "TEACHER", {"hidden": 32, "layers": 1, "heads": 2, "steps": 12, "batch": 4})
    monkeypatch.setattr(demo, "STUDENT", {"hidden": 32, "layers": 1, "heads": 2, "steps": 2, "seed": 1, "batch": 4})


async def test_the_demo_runs_from_corpus_to_curve_and_reuses_what_it_trained(small, tmp_path):
    told = Told()
    first = await demo.demo("gjs", steps=3, seed=1, out=tmp_path / "a", cache=tmp_path / "cache", progress=told)
    assert told.stages == [("train the teacher", 12), ("train the student", 2), ("distil", 3)]
    assert told.kinds.count("step") == 3
    assert first.figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.tokens == sum(record["tokens"] for record in read_metrics(tmp_path / "a" / "metrics.jsonl", "step"))
    assert (tmp_path / "a" / "student" / "model.safetensors").exists()
    summary = json.loads((tmp_path / "a" / "demo.json").read_text())
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


def test_the_corpus_is_the_same_every_time_and_a_mixture_from_the_start():
    files = corpus.standard_library_files(500_000)
    assert files == corpus.standard_library_files(500_000)
    assert len({path.parent for path in files[:20]}) > 3
    assert sum(path.stat().st_size for path in files) <= 500_000


def test_encoding_and_decoding_lose_nothing(tmp_path):
    texts = corpus.read_texts(corpus.standard_library_files(200_000))
    corpus.train_tokenizer(texts, 512, tmp_path)
    from transformers import AutoTokenizer

    ids = corpus.encode(texts[:2], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.eos_token
    assert tokenizer.decode(ids) == texts[0] + end + texts[1] + end


async def test_a_folder_that_is_not_a_demos_is_left_alone(small, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds something that is no run"):
        await demo.demo("gjs", steps=1, out=tmp_path, cache=tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "most"), [("topk_pg", 0.75), ("gjs", 0.9), ("scalar_kl", 0.9)])
async def test_the_demo_as_shipped_brings_the_student_closer(objective, most, tmp_path):
    """The sizes a newcomer gets; the trained models come from (or go to) the user's cache, as for them."""
    result = await demo.demo(objective, seed=1, out=tmp_path / "run")
    assert result.after["reverse_kl"] <= most * result.before["reverse_kl"]
    assert result.after["agreement"] > result.before["agreement"] or objective != "topk_pg"
