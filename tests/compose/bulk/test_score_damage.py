"""What a cache has lost is asked again, and nothing else is: an index that still names a record is no answer."""

import json

import pytest

from tests.fakes.in_process import InProcessTeacher, lists
from topkd.compose import score as job
from topkd.compose.bulk.config import ScoreConfig
from topkd.offline import ScoreStore, TeacherIdentity, gc, verify

ROWS = 12


@pytest.fixture
def score(tmp_path, monkeypatch):
    monkeypatch.setattr("topkd.compose.teachers.served.VllmInProcess", InProcessTeacher)
    data = tmp_path / "data.jsonl"
    rows = [{"prompt_ids": [1, 2], "completion_ids": [30 + i, 60 + i, 90 + i]} for i in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def score(**changes):
        InProcessTeacher.asked.clear()
        teachers = {"teachers": ("vllm:teacher",), "k": 3}
        return await job.score(ScoreConfig(data=data, out=tmp_path / "cache", **teachers, **changes))

    return score


def flipped(data, number):
    """One bit of what the teacher said of row ``number``."""
    exact = lists([1, 2, 30 + number, 60 + number, 90 + number], 1).actual_logp.tobytes()
    assert data.count(exact) == 1
    at = data.index(exact)
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("damage", ["a bit", "cut"])
async def test_damaged_records_are_foretold_and_asked_again_and_no_other_is(score, tmp_path, damage, sealed):
    await score()
    (segment,) = (tmp_path / "cache").glob("*.tkl")
    data = segment.read_bytes()
    if damage == "a bit":
        segment.write_bytes(flipped(flipped(data, 3), 8))
    else:
        segment.write_bytes(data[: len(data) // 2])
    if not sealed:
        segment.with_suffix(".idx").unlink()
    with ScoreStore(tmp_path / "cache") as store:
        held = sum(1 for _ in store.records())
    lost = ROWS - held
    assert lost == 2 if damage == "a bit" else 2 < lost < ROWS
    assert (await score(estimate=True)).scored == lost
    assert InProcessTeacher.asked == []
    report = await score()
    assert (report.scored, report.cached, len(InProcessTeacher.asked)) == (lost, held, lost)
    assert (await score()).cached == ROWS
    gc(tmp_path / "cache")
    assert verify(tmp_path / "cache").ok
    with ScoreStore(tmp_path / "cache") as store:
        for i in range(ROWS):
            ids = [1, 2, 30 + i, 60 + i, 90 + i]
            found = store.get(TeacherIdentity("teacher"), ids, 1, 3)
            assert found.actual_logp.tobytes() == lists(ids, 1).actual_logp.tobytes()
