"""Recorded rollouts say what the student and the teacher gave each token, and recording changes nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.pieces import VOCAB, model_folder, scalar_sample
from topkd.engine.config.objectives import EOPD, CustomObjective, ForwardKL, ScalarKL, TopKPolicyGradient
from topkd.engine.loop.scoring import ScoredBatch
from topkd.engine.loop.transcripts import TranscriptLimits, TranscriptRecorder
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.student import Student
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.topk import SampleCore, ScalarBehavior, TopKPreparedSample, gjs

PROMPT, COMPLETION = [5, 17, 40], [61, 8, 203, 99, 7]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folders = [model_folder(tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (1, 2)]
    return Student.load(str(folders[0]), "cpu"), Student.load(str(folders[1]), "cpu"), load_tokenizer(str(folders[0]))


def scored(teacher: Student, k: int, completion=COMPLETION):
    ids = np.array(PROMPT + completion)
    topk = asyncio.run(LocalTeacher(teacher).score(ids, len(PROMPT) - 1, k))
    core = SampleCore(ids, len(PROMPT), np.ones(len(completion), dtype=bool), np.array(PROMPT), sample_id="row 9")
    return TopKPreparedSample(core, ScalarBehavior(np.full(len(completion), -2.5, dtype=np.float32)), topk)


def recorder(path, student, tokenizer, objective=None, **options):
    options = {"steps": 20, "k": 6} | options
    limits = TranscriptLimits(**{name: options.pop(name) for name in ("moments", "k", "max_tokens") if name in options})
    return TranscriptRecorder(
        path, student=student, tokenizer=tokenizer, objective=objective or TopKPolicyGradient(beta=0.5),
        lock=threading.Lock(), limits=limits, **options,
    )  # fmt: skip


def dense(model: Student) -> np.ndarray:
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([PROMPT + COMPLETION])).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()[len(PROMPT) - 1 : -1]


def test_every_number_of_a_token_is_the_models_own(pair, tmp_path):
    student, teacher, tokenizer = pair
    record = recorder(tmp_path / "t", student, tokenizer).record(3, scored(teacher, VOCAB))
    s, t = dense(student), dense(teacher)
    divergence = gjs(t, s, 0.5)
    for row, (token, drawn) in enumerate(zip(record["tokens"], COMPLETION, strict=True)):
        ratio = np.exp(t[row, drawn] - s[row, drawn])
        assert token["id"] == drawn
        assert token["student_logp"] == pytest.approx(s[row, drawn], abs=2e-3)
        assert token["teacher_logp"] == pytest.approx(t[row, drawn], abs=2e-3)
        assert token["behavior_logp"] == -2.5
        assert token["advantage"] == pytest.approx(0.5 * np.log(0.5 * ratio + 0.5), abs=2e-3)
        assert token["divergence"] == pytest.approx(divergence[row], abs=2e-3)
        assert [i for i, _ in token["student"]] == np.argsort(-s[row])[:6].tolist()
        assert [i for i, _ in token["teacher"]] == np.argsort(-t[row])[:6].tolist()
        assert token["student"][0][1] == pytest.approx(s[row].max(), abs=2e-3)
        assert token["text"] == tokenizer.decode([drawn]) or "�" in tokenizer.decode([drawn])
    assert record["sample_id"] == "row 9"
    assert record["prompt"] == tokenizer.decode(PROMPT)


def test_a_scalar_objective_without_lists_has_advantages_and_no_divergence(pair, tmp_path):
    student, _, tokenizer = pair
    sample = scalar_sample(PROMPT, COMPLETION, [-1.0, -2.0, np.nan, -1.0, -3.0], [-2.0] * 5)
    record = recorder(tmp_path / "t", student, tokenizer, ScalarKL()).record(1, sample)
    drawn = dense(student)[np.arange(5), COMPLETION]
    assert record["tokens"][0]["advantage"] == pytest.approx(-1.0 - drawn[0], abs=2e-3)
    assert [token["teacher"] for token in record["tokens"]] == [None] * 5
    assert all(np.isnan(token["divergence"]) for token in record["tokens"])
    assert np.isnan(record["tokens"][2]["teacher_logp"])
    assert [token["trains"] for token in record["tokens"]] == [True, True, False, True, True]


def test_the_divergence_takes_the_stored_tail_never_one_of_rounded_logprobs(pair, tmp_path):
    student, teacher, tokenizer = pair
    sample = scored(teacher, 5)
    kept = np.log1p(-np.exp(sample.teacher.tail_logp, dtype=np.float64))  # log of the mass of the list
    coarse = sample.teacher.logp - kept.astype(np.float32)[:, None]  # as if rounding had left nothing over
    rounded = replace(sample, teacher=replace(sample.teacher, logp=coarse))
    t, s = np.exp(coarse, dtype=np.float64), np.exp(np.take_along_axis(dense(student), sample.teacher.ids, axis=1))
    tail = np.exp(sample.teacher.tail_logp, dtype=np.float64)
    record = recorder(tmp_path / "t", student, tokenizer, ForwardKL()).record(1, rounded)
    expected = (t * np.log(t / s)).sum(1) + tail * np.log(tail / (1 - s.sum(1)))
    assert [token["divergence"] for token in record["tokens"]] == pytest.approx(expected, rel=2e-3)


def test_advantages_are_shown_where_the_objective_that_trains_has_them(pair, tmp_path):
    student, teacher, tokenizer = pair
    drawn = np.arange(5), COMPLETION
    record = recorder(tmp_path / "t", student, tokenizer, EOPD()).record(1, scored(teacher, 4))
    plain = dense(teacher)[drawn] - dense(student)[drawn]
    assert [token["advantage"] for token in record["tokens"]] == pytest.approx(plain, abs=5e-3)

    custom = CustomObjective(function="losses.py:mine")
    record = recorder(tmp_path / "t", student, tokenizer, custom).record(1, scored(teacher, 4))
    assert record["objective"] == "losses.py:mine"
    assert all(np.isnan(token["advantage"]) for token in record["tokens"])


def test_only_the_moments_are_written_as_strict_json_and_long_rollouts_are_cut_with_a_count(pair, tmp_path):
    student, teacher, tokenizer = pair
    path = tmp_path / "tokens.jsonl"
    writer = recorder(path, student, tokenizer, moments=3, max_tokens=2)
    batch = ScoredBatch([scored(teacher, 4) for _ in range(5)], Counter())
    for step in range(1, 21):
        writer.on_batch(step, batch)
    records = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert Counter(record["step"] for record in records) == {1: 2, 10: 2, 20: 2}
    assert {(len(record["tokens"]), record["left_out"]) for record in records} == {(2, 3)}


def test_a_resumed_run_writes_no_step_twice_and_mends_a_torn_line(pair, tmp_path):
    student, teacher, tokenizer = pair
    path = tmp_path / "tokens.jsonl"
    batch = ScoredBatch([scored(teacher, 4)], Counter())
    first = recorder(path, student, tokenizer, moments=2)
    first.on_batch(1, batch)
    with path.open("a") as file:
        file.write('{"step": 20, "tok')
    again = recorder(path, student, tokenizer, moments=2)
    for step in (1, 20):
        again.on_batch(step, batch)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 20]


def test_recording_draws_no_random_number_and_leaves_no_gradient(pair, tmp_path):
    student, teacher, tokenizer = pair
    before = torch.get_rng_state()
    recorder(tmp_path / "t", student, tokenizer).on_batch(1, ScoredBatch([scored(teacher, 4)], Counter()))
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_a_file_that_cannot_be_written_ends_the_recording_and_says_so_once(pair, tmp_path):
    student, teacher, tokenizer = pair
    said: list[str] = []
    writer = recorder(tmp_path / "gone" / "t", student, tokenizer, moments=2, problem=said.append)
    for step in (1, 20):
        writer.on_batch(step, ScoredBatch([scored(teacher, 4)], Counter()))
    assert len(said) == 1
    assert "no longer recorded" in said[0]
