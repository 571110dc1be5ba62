"""A run that teaches itself, gives feedback on attempts, is evaluated while it trains, and tells its trackers."""

import asyncio
import json

import numpy as np
import pytest
import torch

from tests.engine.pieces import model_folder
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.answer_scorers import exact_match, load_answer_scorer, score_numeric_match
from topkd.compose.data.prompts import load_prompts
from topkd.compose.preflight.evaluation import plan_evaluation
from topkd.compose.progress import Progress
from topkd.compose.run.evaluation import Evaluation
from topkd.compose.run.observers import select_numbers
from topkd.compose.teachers.feedback import build_feedback_context
from topkd.compose.train import train
from topkd.engine.loop.metrics import read_metrics
from topkd.engine.models.divergences import Probe, exact_divergences
from topkd.engine.models.local_teacher import SelfTeacher
from topkd.engine.models.student import Student
from topkd.topk import Rollout, SamplingParams
from topkd.topk.errors import ConfigError, DataError

SCORER = """
def score(row, completion):
    return 0.25

def broken(row, completion):
    return row["nothing"]

def feedback(row, completion):
    return None if completion == row["answer"] else f"you wrote {completion!r}, not {row['answer']}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("watching")
    model_folder(root / "student", seed=1)
    model_folder(root / "teacher", seed=2)
    lines = [{"prompt": f"{n} + 1 =", "answer": str(n + 1), "hint": f"it is {n + 1}", "id": n} for n in range(4)]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "mine.py").write_text(SCORER)
    return root


def run_config(folder, **changes):
    data = str(folder / "data.jsonl")
    values = {
        "steps": 4,
        "k": 8,
        "max_staleness": 0,
        "student": {"model": str(folder / "student"), "device": "cpu"},
        "teacher": {"kind": "self", "ema": 0.5},
        "data": {"path": data},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_completion_tokens": 6},
        "learner": {"lr": 3e-3},
        "eval": {
            "path": data,
            "every": 2,
            "max_tokens": 5,
            "scorer": f"{folder / 'mine.py'}:score",
            "best": "reverse_kl",
        },
        "checkpoint": {"every": 2},
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    asyncio.run(train(run_config(folder, track={"tensorboard": True}), out))
    return out


@pytest.mark.parametrize("ema", [0.0, 0.75, 1.0])
def test_a_self_teacher_stands_still_follows_or_is_the_student(folder, ema):
    import threading

    student = Student.load(str(folder / "student"), "cpu")
    before = {name: weights.detach().clone() for name, weights in student.model.named_parameters()}
    teacher = SelfTeacher(student, ema, threading.Lock())
    with torch.no_grad():
        for weights in student.model.parameters():
            weights.add_(1.0)
    teacher.follow()
    for name, weights in teacher.model.model.named_parameters():
        torch.testing.assert_close(weights, before[name] + (1.0 - ema), rtol=0, atol=1e-5)
    assert (teacher.state_dict() != {}) == (ema == 0.75)


async def test_a_resumed_self_distillation_ends_where_the_uninterrupted_one_does(folder, whole, tmp_path):
    half = run_config(folder, steps=2)
    await train(half, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "teacher-self.safetensors").exists()
    await train(run_config(folder, steps=4), tmp_path / "run", resume=True)
    found, wanted = (read_metrics(out / "metrics.jsonl", "eval") for out in (tmp_path / "run", whole))
    last = [record for record in found if record["step"] == 4]
    assert last == [record for record in wanted if record["step"] == 4]


def test_evaluations_are_of_fixed_and_fresh_prefixes_with_accuracy_and_ceiling(folder, whole):
    evals = read_metrics(whole / "metrics.jsonl", "eval")
    assert [(record["step"], record["prefixes"]) for record in evals] == [
        (step, prefixes) for step in (0, 2, 4) for prefixes in ("fixed", "fresh")
    ]
    assert all(record["accuracy"] == record["teacher_accuracy"] == 0.25 for record in evals[::2])
    assert "accuracy" not in evals[1]
    assert evals[0]["reverse_kl"] > 0  # told a hint, the same weights answer otherwise
    kept = json.loads((whole / "student-best" / "topkd.json").read_text())
    best = min(evals[::2], key=lambda record: record["reverse_kl"])
    assert (kept["metric"], kept["version"], kept["value"]) == ("reverse_kl", best["step"], best["reverse_kl"])
    student, again = (Student.load(str(whole / name), "cpu") for name in ("student-best", "student"))
    same = all(torch.equal(*pair) for pair in zip(student.model.parameters(), again.model.parameters(), strict=True))
    assert same == (best["step"] == 4)


def test_tensorboard_holds_the_numbers_of_the_run_log(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    steps = read_metrics(whole / "metrics.jsonl", "step")
    found = {event.step: event.value for event in events.Scalars("step/loss")}
    assert found == {record["step"]: pytest.approx(record["loss"], rel=1e-5) for record in steps}
    assert [event.step for event in events.Scalars("eval_fresh/reverse_kl")] == [0, 2, 4]


def test_a_record_gives_its_finite_numbers_by_name():
    record = {"loss": 1.5, "lost": {"a": 2}, "ok": True, "nan": float("nan"), "list": [1], "mode": "x", "n": 3}
    assert dict(select_numbers(record)) == {"loss": 1.5, "lost/a": 2.0, "n": 3.0}


async def test_wandb_goes_on_with_the_same_run_after_a_resume(folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked, logged = [], []

    class Run:
        id = "abc123"

        def define_metric(self, *args, **more): ...

        def log(self, values):
            logged.append(values)

        def finish(self): ...

    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or Run())
    table = {"wandb_project": "mine"}
    for steps in (1, 2):
        await train(run_config(folder, steps=steps, eval=None, track=table), tmp_path / "run", resume=steps == 2)
    assert [options["id"] for options in asked] == [None, "abc123"]
    assert {options["project"] for options in asked} == {"mine"}
    assert [values["topkd/step"] for values in logged if "step/loss" in values] == [1, 2]


def test_divergences_under_two_prompts_are_those_of_each_sides_own_sequence(folder):
    student, teacher = (Student.load(str(folder / name), "cpu") for name in ("student", "teacher"))
    probe = Probe(np.array([5, 9, 30, 40, 50]), 2, np.array([7, 8, 9]))
    found = exact_divergences(student, teacher, [probe])

    def logp(model, ids, rows):
        with torch.inference_mode():
            return torch.log_softmax(model.model(input_ids=torch.tensor([ids])).logits[0, rows].double(), -1)

    s, t = logp(student, [5, 9, 30, 40], slice(1, 4)), logp(teacher, [7, 8, 9, 30, 40], slice(2, 5))
    assert found["reverse_kl"] == pytest.approx(float((s.exp() * (s - t)).sum(-1).mean()), rel=1e-5)
    assert found["eval_tokens"] == 3


def test_feedback_on_the_very_completion_stands_in_the_teachers_prompt_alone(folder):
    data = {"path": str(folder / "data.jsonl"), "feedback": f"{folder / 'mine.py'}:feedback"}
    config = run_config(folder, data=data)
    prompts = load_prompts(config, Progress())
    context, row, tokenizer = build_feedback_context(config, prompts), prompts.rows[0], prompts.tokenizer

    def answered(text):
        ids = np.array(tokenizer(text)["input_ids"], np.int32)
        return context(row, Rollout(row.prompt_ids, ids, np.full(ids.size, -1.0, np.float32), "stop", SamplingParams()))

    told = answered(" 7")
    assert "you wrote ' 7', not 1" in tokenizer.decode(told.teacher_prompt_ids)
    assert told.prompt_ids is row.prompt_ids
    assert answered("1") is row
    assert build_feedback_context(run_config(folder), prompts) is None


def test_scorers_take_the_last_number_or_the_whole_text():
    row = {"answer": "1,200"}
    assert [score_numeric_match(row, text) for text in ("so 3 and then 1200.0", "1,200", "12", "none")] == [1, 1, 0, 0]
    assert [exact_match({"answer": 7}, text) for text in (" 7\n", "7.", "77")] == [1, 0, 0]
    with pytest.raises(DataError, match=r"needs an answer .*columns \['prompt'\]"):
        exact_match({"prompt": "x"}, "y")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "eval.scorer names no function: got 'nothing'"),
        ("no.such.module:f", "eval.scorer cannot be imported .*ModuleNotFoundError"),
        ("/no/such.py:f", "cannot be imported .*no file"),
        ("{mine}:absent", "names no function .*'absent'"),
    ],
)
def test_a_scorer_that_is_not_there_is_one_line(folder, name, message):
    with pytest.raises(ConfigError, match=message):
        load_answer_scorer(name.format(mine=folder / "mine.py"))


def test_a_scorer_that_fails_names_its_row(folder):
    with pytest.raises(ConfigError, match=r"the scorer failed .*row 3\): got KeyError: 'nothing'"):
        load_answer_scorer(f"{folder / 'mine.py'}:broken")({"id": 3}, "x")


async def test_an_evaluation_that_cannot_measure_is_refused_before_the_first_step(folder, tmp_path):
    data = str(folder / "data.jsonl")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "x"}\n')
    for table, message in (
        ({"path": str(bare), "scorer": "exact_match"}, "needs an answer"),
        ({"path": data, "teacher": str(tmp_path / "none")}, "no such model folder"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            await train(run_config(folder, eval=table), tmp_path / f"run{len(message)}")


async def test_a_stop_id_beyond_the_students_vocabulary_is_refused_by_its_name(folder, tmp_path):
    changes = {"rollout": {"prompts_per_step": 4, "max_completion_tokens": 6, "stop_token_ids": [300]}}
    with pytest.raises(ConfigError, match=r"rollout.stop_token_ids .*got 300, expected below 300"):
        await train(run_config(folder, **changes), tmp_path / "run")


async def test_rows_of_teachers_whose_weights_are_elsewhere_are_left_out_of_divergences_and_named(folder, tmp_path):
    class Heard(Progress):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    rows = [{"prompt": f"{n} + 1 =", "teacher_id": "far" if n == 2 else "near"} for n in range(3)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    far = tmp_path / "far.jsonl"
    far.write_text(json.dumps(rows[2]) + "\n")
    teachers = {"near": {"kind": "local", "model": str(folder / "teacher")}, "far": {"url": "http://127.0.0.1:9"}}
    config = run_config(
        folder, teacher=None, teachers=teachers, eval={"path": str(data), "max_tokens": 5, "prefixes": ["fixed"]}
    )
    prompts = load_prompts(config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})}),
                           Progress())  # fmt: skip
    student = Student.load(str(folder / "student"), "cpu")
    plan = plan_evaluation(config, config.eval, prompts.readers, {"near"})
    near, heard = Student.load(str(folder / "teacher"), "cpu"), Heard()
    evaluation = Evaluation(
        config, plan, student=student, tokenizer=prompts.tokenizer, models={"near": near}, out=tmp_path
    )
    await evaluation.measure_ceiling({}, heard)
    assert heard.notes == ["exact divergences leave out the rows of teacher 'far': its weights are not on this machine"]
    (record,) = await asyncio.to_thread(evaluation)
    assert 2 <= record["eval_tokens"] <= 10
    with pytest.raises(ConfigError, match="nothing to measure"):
        plan_evaluation(config, config.eval.model_copy(update={"path": str(far)}), prompts.readers, {"near"})
