"""A whole step scored in one pass is scored as its sequences are one by one, however they are asked for."""

import asyncio

import numpy as np
import pytest

from tests.fakes.tinymodels import make_tiny_model
from topkd.compose.comparison.embedded import StepTeacher
from topkd.engine.models.local_teacher import LocalTeacher
from topkd.engine.models.student import Student
from topkd.topk.errors import ConfigError
from topkd.topk.samples import Rollout, SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Student.load(str(make_tiny_model(tmp_path_factory.mktemp("teacher") / "t", vocab=512, hidden=32)), "cpu")


def rollouts(rng, lengths):
    return [
        Rollout(
            rng.integers(1, 512, 5 + n % 3).astype(np.int32), rng.integers(1, 512, n).astype(np.int32),
            np.full(n, -1.0, dtype=np.float32), "length", SamplingParams(max_tokens=n),
        )
        for n in lengths
    ]  # fmt: skip


def whole(one):
    return np.concatenate([one.prompt_ids, one.completion_ids])


def test_a_step_in_one_pass_scores_as_its_sequences_do_alone(model, monkeypatch):
    step = rollouts(np.random.default_rng(0), [4, 9, 7, 4])
    together, alone = StepTeacher(model), LocalTeacher(model)
    together.expect(step)
    passes, logit_rows = [], Student.logit_rows

    def counted(self, ids, attention, rows):
        passes.append(tuple(ids.shape))
        return logit_rows(self, ids, attention, rows)

    async def score():
        return await asyncio.gather(*(together.score(whole(one), one.prompt_ids.size - 1, 6) for one in step))

    monkeypatch.setattr(Student, "logit_rows", counted)
    found = asyncio.run(score())
    assert passes == [(4, max(whole(one).size for one in step) - 1)]
    for one, topk in zip(step, found, strict=True):
        expected = asyncio.run(alone.score(whole(one), one.prompt_ids.size - 1, 6))
        assert (topk.start, topk.ids.tolist()) == (expected.start, expected.ids.tolist())
        np.testing.assert_allclose(topk.logp, expected.logp, atol=1e-5)
        np.testing.assert_allclose(topk.actual_logp, expected.actual_logp, atol=1e-5)


def test_a_sequence_that_nobody_announced_is_scored_by_itself_and_a_bad_start_is_refused(model):
    (expected, other) = rollouts(np.random.default_rng(1), [6, 6])
    teacher = StepTeacher(model)
    teacher.expect([expected])
    ours = asyncio.run(teacher.score(whole(other), 4, 3))
    np.testing.assert_array_equal(ours.logp, asyncio.run(LocalTeacher(model).score(whole(other), 4, 3)).logp)
    with pytest.raises(ConfigError, match="nothing to score"):
        asyncio.run(teacher.score(whole(expected), 99, 3))
