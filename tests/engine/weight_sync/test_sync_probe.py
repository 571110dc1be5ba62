"""The probe of pushed weights: how near is near enough depends on what the learner computes in."""

import numpy as np
import pytest

from tests.engine.pieces import model_folder
from topkd.engine.models.student import Student
from topkd.engine.weight_sync.sync import SyncProbe
from topkd.topk.errors import SyncError
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


class Serving:
    """A server that draws from these rows, each logprob a little off as another engine's is."""

    def __init__(self, rows, noise=1e-3):
        self.rows, self.noise, self.rng = iter(rows), noise, np.random.default_rng(0)

    async def sample(self, prompt, n, params):
        row = next(self.rows)
        tokens = self.rng.choice(row.size, n, p=np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum())
        near = self.rng.normal(0, self.noise, n)
        return [Rollout(prompt, [int(t)], [row[t] + e], "length", params) for t, e in zip(tokens, near, strict=True)]


@pytest.mark.parametrize("held", ["the base model", "the version before"])
async def test_a_sampler_that_has_older_weights_is_refused_however_near_they_are(tmp_path, held):
    """0.02 nats off is below every alarm, and twenty times an engine's own rounding."""
    student = Student.load(str(model_folder(tmp_path / "student")), "cpu")
    probe = SyncProbe.of(student, [np.array([5, 9 + i], np.int32) for i in range(4)])
    rows = probe.rows()
    rng = np.random.default_rng(1)
    names = ("the base model", "the version before")
    older = {name: rows + rng.normal(0, 0.02, rows.shape).astype(np.float32) for name in names}
    await probe.compare(Serving(rows), rows, PARAMS, "there", older=older)
    with pytest.raises(SyncError, match=f"samples from {held}, not from the weights that were pushed"):
        await probe.compare(Serving(older[held]), rows, PARAMS, "there", older=older)
    same = {"the version before": rows}
    await probe.compare(Serving(rows), rows, PARAMS, "there", older=same)
