"""The whole loop on local pieces: it learns, it repeats itself, it accounts for what it loses."""

import asyncio
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.engine.pieces import VOCAB, model_folder
from topkd.engine.config.engine_config import EngineConfig, RolloutConfig
from topkd.engine.config.learner import LearnerConfig
from topkd.engine.config.objectives import GJS, ScalarKL, TopKPolicyGradient
from topkd.engine.learner.learner import Learner
from topkd.engine.loop.hooks import Hooks
from topkd.engine.loop.loop import LoopParts, distil
from topkd.engine.loop.metrics import MetricsLog, drop_timings, make_strict_json, read_metrics
from topkd.engine.loop.prompts import PromptRow, step_indices
from topkd.engine.models.divergences import Probe, exact_divergences
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.sampler import InProcessSampler
from topkd.engine.models.student import Student
from topkd.topk import TopK
from topkd.topk.errors import AuthError, ConfigError, ResponseError, ServerUnreachableError, TrainingError

ROWS = [PromptRow([5 + i, 9], [5 + i, 9], "", f"row{i}") for i in range(12)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return model_folder(root / "student", seed=1), model_folder(root / "teacher", seed=2)


def config(objective, steps=4, **more):
    return EngineConfig(
        steps=steps,
        seed=3,
        k=20,
        objective=objective,
        rollout=RolloutConfig(prompts_per_step=6, samples_per_prompt=2, max_completion_tokens=8),
        learner=LearnerConfig(lr=3e-3),
        **more,
    )


async def run(folders, tmp_path, engine, wrap=lambda teacher: teacher, probes=None):
    student, teacher = (Student.load(str(folder), "cpu") for folder in folders)
    sampler = InProcessSampler(student)
    learner = Learner(student, engine.learner, engine.objective, lock=sampler.lock)
    evaluate = (lambda: exact_divergences(student, teacher, probes)) if probes else None

    async def label(version):
        sampler.version = str(version)

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        records = await distil(
            LoopParts(engine, ROWS, sampler, {"": wrap(LocalTeacher(teacher))}),
            learner,
            log,
            hooks=Hooks(evaluate=evaluate, publish=label),
        )
    return records, read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("objective", [TopKPolicyGradient(), GJS(), ScalarKL()], ids=lambda o: o.kind)
async def test_the_exact_divergence_falls(folders, tmp_path, objective):
    probes = [Probe(np.array([5 + i, 9, 30 + i, 40]), 2) for i in range(12)]
    _, run_log = await run(folders, tmp_path, config(objective, steps=40, eval_every=20), probes=probes)
    evals = [record["reverse_kl"] for record in run_log if record["kind"] == "eval"]
    assert len(evals) == 3
    assert evals[-1] < 0.9 * evals[0]
    modes = {record["divergence_mode"] for record in run_log if record["kind"] == "step"}
    assert modes == {objective.kind}  # the first step like all others


async def test_a_run_repeats_itself_exactly(folders, tmp_path):
    first, _ = await run(folders, tmp_path / "a", config(TopKPolicyGradient()))
    second, _ = await run(folders, tmp_path / "b", config(TopKPolicyGradient()))
    assert [drop_timings(record) for record in first] == [drop_timings(record) for record in second]
    timed = first[0].keys() - drop_timings(first[0]).keys()
    assert timed == {"sample_s", "score_wait_s", "learn_s", "publish_s", "elapsed_s"}


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_staleness_is_what_the_config_says(folders, tmp_path, staleness):
    records, _ = await run(folders, tmp_path, config(GJS(), steps=6, max_staleness=staleness))
    assert [record["staleness"] for record in records] == [min(step, staleness) for step in range(6)]
    if staleness == 0:
        assert all(record["ratio_max"] == pytest.approx(1.0, abs=1e-3) for record in records)


class Faulty:
    """Fails every ``every``-th call with ``error``; otherwise the teacher it wraps."""

    def __init__(self, teacher, error, every):
        self.teacher, self.error, self.every, self.calls = teacher, error, every, 0

    async def score(self, ids, start, k):
        self.calls += 1
        if self.calls % self.every == 0:
            raise self.error
        return await self.teacher.score(ids, start, k)


async def test_a_lost_sample_is_reported_and_the_batch_survives(folders, tmp_path):
    records, _ = await run(
        folders, tmp_path, config(GJS()), lambda teacher: Faulty(teacher, ResponseError("one row short"), 6)
    )
    assert [record["lost"] for record in records] == [{"ResponseError": 2}] * 4
    assert [record["samples"] for record in records] == [10] * 4


async def test_an_empty_completion_is_a_lost_sample_not_the_end_of_the_run(folders, tmp_path, monkeypatch):
    real = InProcessSampler.sample_batch

    async def first_one_empty(self, *args, **more):
        drawn = await real(self, *args, **more)
        first = drawn[0][0]
        drawn[0][0] = dataclasses.replace(first, completion_ids=first.completion_ids[:0], logp=first.logp[:0])
        return drawn

    monkeypatch.setattr(InProcessSampler, "sample_batch", first_one_empty)
    records, _ = await run(folders, tmp_path, config(GJS(), steps=2))
    assert [(record["samples"], record["lost"]) for record in records] == [(11, {"ResponseError": 1})] * 2


async def test_a_hole_counts_as_missing_and_not_as_mass_zero(folders, tmp_path):
    class Holes:
        def __init__(self, teacher):
            self.teacher, self.shares = teacher, []

        async def score(self, ids, start, k):
            rows = await self.teacher.score(ids, start, k)
            self.shares += rows.mass()[1:].tolist()
            lists = [None] + [list(zip(i.tolist(), p.tolist(), strict=True)) for i, p in
                              zip(rows.ids[1:], rows.logp[1:], strict=True)]  # fmt: skip
            return TopK.from_lists(lists, start=start, actual_ids=rows.actual_ids, actual_logp=rows.actual_logp)

    holes = []
    records, _ = await run(
        folders,
        tmp_path,
        config(TopKPolicyGradient(), steps=1),
        lambda teacher: holes.append(Holes(teacher)) or holes[0],
    )
    assert records[0]["rows_without_signal"] == 12 == records[0]["masked_tokens"]
    assert records[0]["teacher_mass"] == pytest.approx(np.mean(holes[0].shares), rel=1e-4)


async def test_each_record_names_the_policy_versions_of_its_rollouts(folders, tmp_path):
    records, _ = await run(folders, tmp_path, config(GJS(), steps=4, max_staleness=1))
    assert [record["rollout_versions"] for record in records] == [["0"], ["0"], ["1"], ["2"]]


async def test_losing_too_many_samples_ends_the_run_with_the_account(folders, tmp_path):
    with pytest.raises(TrainingError, match=r"lost 6 of 12 samples.*one row short"):
        await run(folders, tmp_path, config(GJS()), lambda teacher: Faulty(teacher, ResponseError("one row short"), 2))


@pytest.mark.parametrize("error", [ServerUnreachableError("teacher is gone"), AuthError("no key")], ids=repr)
async def test_a_dead_or_refusing_teacher_ends_the_run_with_its_own_error(folders, tmp_path, error):
    with pytest.raises(type(error), match=error.what):
        await asyncio.wait_for(
            run(folders, tmp_path, config(GJS()), lambda teacher: Faulty(teacher, error, 1)), timeout=240
        )


async def test_an_unmapped_teacher_is_refused_before_the_first_request(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.engine.loop.test_loop.ROWS", [PromptRow([5], [5], "maths", "r")])
    with pytest.raises(ConfigError, match="no teacher named 'maths'"):
        await run(folders, tmp_path, config(GJS()), lambda teacher: Faulty(teacher, AssertionError("asked"), 1))


async def test_an_overlong_prompt_is_refused_not_cut(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.engine.loop.test_loop.ROWS", [PromptRow([5] * 3000, [5], "", "long one")])
    with pytest.raises(ConfigError, match=r"longer than rollout.max_prompt_tokens \(row long one\): got 3000"):
        await run(folders, tmp_path, config(GJS()))


def test_every_row_comes_once_before_any_comes_twice():
    taken = [i for step in range(6) for i in step_indices(10, 5, step, seed=1)]
    for epoch in range(3):
        assert sorted(taken[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert taken[:10] != taken[10:20]
    assert taken[5:10] == step_indices(10, 5, 1, seed=1)


def test_exact_divergences_equal_a_slow_float64_loop(folders):
    import torch

    student, teacher = (Student.load(str(folder), "cpu") for folder in folders)
    probes = [Probe(np.array([5, 9, 30, 40, 7]), 2), Probe(np.array([8, 3]), 1)]
    got = exact_divergences(student, teacher, probes)
    reverse, rows = 0.0, 0
    for probe in probes:
        ids = torch.tensor(probe.ids[None, :-1].astype(np.int64))
        with torch.inference_mode():
            s, t = (torch.softmax(m.model(input_ids=ids).logits[0].double(), -1).numpy() for m in (student, teacher))
        for row in range(probe.prompt_len - 1, probe.ids.size - 1):
            reverse += sum(s[row, v] * np.log(s[row, v] / t[row, v]) for v in range(VOCAB))
            rows += 1
    assert rows == got["eval_tokens"] == 4
    assert got["reverse_kl"] == pytest.approx(reverse / rows, rel=1e-4)
    assert exact_divergences(student, student, probes)["reverse_kl"] == pytest.approx(0.0, abs=1e-12)


def test_ids_that_both_models_exclude_add_nothing_to_a_divergence(folders):
    student, teacher = (Student.load(str(folder), "cpu") for folder in folders)
    probes = [Probe(np.arange(5, 11, dtype=np.int32), 2)]

    def without_the_last_id(model):
        def cut(input_ids, attention_mask, rows):
            logits = Student.logit_rows(model, input_ids, attention_mask, rows).clone()
            logits[:, -1] = -np.inf
            return logits

        return SimpleNamespace(vocab_size=VOCAB, device=model.device, logit_rows=cut)

    found = exact_divergences(without_the_last_id(student), without_the_last_id(teacher), probes)
    assert all(np.isfinite(value) for value in found.values())
    assert 0.0 < found["jsd"] < np.log(2)
    assert exact_divergences(without_the_last_id(student), teacher, probes)["forward_kl"] == np.inf


def test_a_number_that_json_cannot_say_is_null_at_any_depth():
    told = {"last_step": {"kl_k1": math.nan, "lost": {}, "of": [1.5, (math.inf, -math.inf)]}, "out": "runs/a"}
    assert json.loads(json.dumps(make_strict_json(told), allow_nan=False)) == {
        "last_step": {"kl_k1": None, "lost": {}, "of": [1.5, [None, None]]},
        "out": "runs/a",
    }
