"""The probe of pushed weights: how near is near enough depends on what the learner computes in."""

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.engine.models.student import Student
from topkd.engine.weight_sync.sync import SyncProbe
from topkd.topk.samples import Rollout, SamplingParams

PARAMS = SamplingParams(max_tokens=1)


class OffBy:
    """A server that says of each token it draws a logprob that is so many nats from the learner's."""

    def __init__(self, rows, nats):
        self.rows, self.nats = iter(rows), nats

    async def sample(self, prompt, n, params):
        row, tokens = next(self.rows), np.arange(n)
        return [Rollout(prompt, [token], [row[token] + self.nats], "length", params) for token in tokens]


@pytest.mark.parametrize(
    ("dtype", "first_nats", "limit"),
    [("float32", 1e-13, 1e-5), ("float32", 1e-6, None), ("float32", None, None), ("bfloat16", 0.0, None)],
)
async def test_only_a_float32_student_whose_first_push_agreed_is_told_of_a_part_that_is_not_taken_up(
    tmp_path, dtype, first_nats, limit
):
    """A bfloat16 student's fresh adapter adds exact zeros at first, and from its first step on rounding: 1.7e-4."""
    student = Student.load(str(model_folder(tmp_path / "student")), "cpu", dtype)
    probe = SyncProbe.of(student, [np.array([5, 9], np.int32)] * 4)
    rows = probe.rows()
    found = await probe.compare(OffBy(rows, 0.02), rows, PARAMS, "there", first_nats=first_nats)
    assert found["sync_kl"] == pytest.approx(2e-4, rel=0.02)
    assert [alarm["limit"] for alarm in found.get("alarms", [])] == ([] if limit is None else [limit])
