"""One list of checks for train, replay and their dry runs, and what each process of a run does of it."""

import json
import sys
import threading

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.compose.cache.rollouts import RecordedSampler
from topkd.compose.config.run_config import RunConfig
from topkd.compose.dry_run import dry_run
from topkd.compose.preflight import preflight as checks
from topkd.compose.preflight.preflight import Preflight, preflight
from topkd.compose.replay import replay
from topkd.compose.run import evaluation, observers
from topkd.compose.run.run import Run
from topkd.compose.train import train
from topkd.engine.learner.distributed import Ranks
from topkd.engine.loop.metrics import read_metrics
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.topk import Rollout, SamplingParams
from topkd.topk.errors import ConfigError, TopkdError

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("one_preflight")
    for name, seed in (("student", 1), ("teacher", 2)):
        model_folder(root / name, seed=seed)
    rows = [{"prompt_ids": [5 + i, 9], "completion_ids": [7, 8]} for i in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "scorers.py").write_text("def one_argument(row):\n    return 1.0\n")
    return root


def run_config(folder, **changes):
    values = {
        "steps": 2,
        "student": {"model": str(folder / "student"), "device": "cpu"},
        "teacher": {"kind": "local", "model": str(folder / "teacher")},
        "data": {"path": str(folder / "rows.jsonl")},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 1, "max_completion_tokens": 4},
        "client": {"max_retries": 1, "backoff_s": 0.01},
        **changes,
    }
    return RunConfig.model_validate(values)


async def test_a_dry_run_lists_every_problem_that_would_end_the_run_one_by_one(folder, monkeypatch):
    find_spec = checks.importlib.util.find_spec
    absent = {"wandb"}
    monkeypatch.setattr(
        checks.importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    broken = {
        "learner": {"schedule": "cosine", "warmup_steps": 5},
        "track": {"wandb_project": "p"},
        "data": {"path": str(folder / "rows.jsonl"), "feedback": "no_such_module:function"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 1, "max_completion_tokens": 4096},
        "on_policy_fraction": 0.1,
        "eval": {"path": str(folder / "rows.jsonl"), "scorer": f"{folder}/scorers.py:one_argument"},
    }
    config = run_config(folder, **broken)
    problems = (await dry_run(config)).problems
    words = ["needs wandb", "feedback", "warmup_steps", "the student's context", "on_policy_fraction", "scorer failed"]
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem
        assert "a relative path is taken from" not in problem  # only where a file of the config is missing
    with pytest.raises(TopkdError) as caught:
        await preflight(Preflight(config))
    assert str(caught.value) == problems[0]


async def test_an_evaluation_of_nothing_is_a_problem_of_the_dry_run_too(folder):
    config = run_config(folder, teacher={"kind": "local", "model": str(folder / "teacher")},
                        eval={"path": str(folder / "rows.jsonl"), "prefixes": []})  # fmt: skip
    (problem,) = (await dry_run(config)).problems
    assert "[eval] has nothing to measure" in problem


async def test_a_local_teacher_with_other_tokens_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    other = model_folder(tmp_path / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = run_config(folder, teacher={"kind": "local", "model": str(other)})
    monkeypatch.setattr("topkd.compose.train.load_student", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="tokens are not the student's") as caught:
        await train(config, tmp_path / "run")
    assert (await dry_run(config)).problems == [str(caught.value)]


async def test_several_processes_and_a_student_on_a_server_are_refused_before_anything_is_asked(folder, monkeypatch):
    config = run_config(folder, sampler={"kind": "server", "url": NOWHERE})
    with pytest.raises(ConfigError, match="with several processes, each must sample from the student in"):
        await preflight(Preflight(config, processes=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert any("with several processes, each must sample" in problem for problem in (await dry_run(config)).problems)
    shards = run_config(folder, rollout={"shards": 3})
    with pytest.raises(ConfigError, match=r"a multiple of the number.*3 shards, 2 processes"):
        await preflight(Preflight(shards, processes=2))


async def test_only_the_first_process_opens_trackers_and_asks_teachers(folder, tmp_path, monkeypatch):
    config = run_config(folder, teacher={"url": NOWHERE}, track={"tensorboard": True},
                        eval={"path": str(folder / "rows.jsonl")})  # fmt: skip
    second = Ranks(1, 2)
    monkeypatch.setattr(observers, "Tracking", lambda *_, **__: pytest.fail("a tracker was opened"))
    monkeypatch.setattr(evaluation, "Evaluation", lambda *_, **__: pytest.fail("a judge was loaded"))
    findings, run = Preflight(config, evaluation="of the first process"), Run(tmp_path, ranks=second)
    async with observers.open_observers(config, None, findings, None, run) as opened:
        assert opened.evaluate is None
        opened.on_record("step", {"step": 1})
    monkeypatch.setattr(checks, "check_teachers", lambda *_, **__: pytest.fail("a teacher was asked"))
    monkeypatch.setattr(Ranks, "first", lambda self, value: {"": "what the first was answered"})
    state = Preflight(config, ranks=second, processes=2)
    await checks._check_teachers(state)
    assert state.teachers == {"": "what the first was answered"}


async def test_cross_entropy_on_the_datas_completions_asks_no_teacher_server(folder, tmp_path):
    config = run_config(folder, steps=1, teacher={"url": NOWHERE}, objective={"kind": "sft"})
    found = await dry_run(config)
    assert (found.problems, found.endpoints) == ([], [])
    result = await train(config, tmp_path / "run")
    assert len(result.steps) == 1


async def test_a_replay_is_checked_like_its_dry_run_and_its_first_event_has_what_trains_has(folder, tmp_path):
    live = run_config(folder, cache={"path": str(tmp_path / "cache")})
    await train(live, tmp_path / "live")
    await replay(live, tmp_path / "again")
    events = [read_metrics(tmp_path / name / "metrics.jsonl", "event")[0] for name in ("live", "again")]
    assert events[0].keys() == events[1].keys()
    assert {"teachers", "data", "stop_token_ids", "warnings"} <= events[1].keys()
    for change, words in (
        ({"learner": {"schedule": "linear", "warmup_steps": 2}}, "warmup_steps"),
        ({"rollout": {"stop_token_ids": [99_999]}}, "rollout.stop_token_ids"),
        ({"k": 21}, "no scores with K entries"),
        ({"eval": {"path": "nowhere.jsonl"}}, "nowhere.jsonl"),
    ):
        wrong = run_config(folder, cache={"path": str(tmp_path / "cache")}, **change)
        with pytest.raises(TopkdError, match=words) as caught:
            await replay(wrong, tmp_path / "wrong")
        assert str(caught.value) in (await dry_run(wrong, served=False, out=tmp_path / "wrong")).problems


async def test_a_resume_parses_the_run_log_once(folder, tmp_path, monkeypatch):
    config = run_config(folder, checkpoint={"every": 1})
    await train(config, tmp_path / "run")
    read: list[object] = []

    def count(path, *rest, original=read_metrics, **options):
        read.append(path)
        return original(path, *rest, **options)

    for module in [*sys.modules.values()]:
        if getattr(module, "read_metrics", None) is read_metrics and module.__name__ != __name__:
            monkeypatch.setattr(module, "read_metrics", count)
    longer = config.model_copy(update={"steps": 3})
    result = await train(longer, tmp_path / "run", resume=True)
    assert (len(read), len(result.steps)) == (1, 3)


async def test_a_caches_rollouts_are_read_and_written_off_the_event_loop(tmp_path):
    loop, used = threading.get_ident(), set()

    class Watched:
        def __init__(self, store):
            self._store, self.path = store, store.path

        def __getattr__(self, name):
            def call(*words, **options):
                used.add((name, threading.get_ident() == loop))
                return getattr(self._store, name)(*words, **options)

            return call

    class Sampler:
        async def sample(self, prompt_ids, n, params, *, k=0):
            return [Rollout(prompt_ids, np.int32([3]), np.float32([-1.0]), "stop", params)] * n

    with ScoreStore(tmp_path / "cache", mode="a") as store:
        sampler = RecordedSampler(Sampler(), Watched(store), TeacherIdentity("student", revision="run-1"))
        for _ in range(2):
            await sampler.sample(np.int32([5, 6]), 1, SamplingParams(max_tokens=1, seed=1))
    assert used == {("get_rollouts", False), ("put_rollouts", False), ("commit", False)}
