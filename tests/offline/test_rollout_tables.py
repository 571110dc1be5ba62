"""Rollouts as a Parquet table and back."""

import numpy as np
import pytest

from tests.offline.samples import same, scored
from topkd.offline import ScoreStore, TeacherIdentity, export_parquet, import_parquet
from topkd.offline.exchange.exchange import import_rollouts
from topkd.offline.store.records import ROLLOUT
from topkd.topk import Rollout, SamplingParams

pq = pytest.importorskip("pyarrow.parquet")


def contents(cache):
    with ScoreStore(cache) as store:
        return sorted((one.header.key, bytes(one.payload)) for one in store.records(kinds=(ROLLOUT,)))


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_rollouts_come_back_under_their_request_with_the_policys_own_lists(tmp_path, codec):
    params, student = SamplingParams(max_tokens=9, seed=3, stop_token_ids=(7,)), TeacherIdentity("s", revision="run-1")
    made = []
    for seed in range(2):
        ids, lists = scored(seed, tokens=30, odd=True)
        ids[:6] = 1
        made.append(Rollout(ids[:6], ids[6:], lists.actual_logp, "length", params, lists, "v2"))
    bare = Rollout(ids[:4], ids[4:9], np.full(5, -1.5, np.float32), "stop", params)
    with ScoreStore(tmp_path / "cache", mode="a", codec=codec) as store:
        store.put_rollouts(student, ids[:6], made, params, k=8, version="w", occurrence=4)
        store.put_rollouts(student, ids[:4], [bare], params)
        kept = store.get_rollouts(student, ids[:6], 2, params, k=8, version="w", occurrence=4)
    assert export_parquet(tmp_path / "cache", tmp_path / "out").records == 2
    rows = pq.read_table(tmp_path / "out" / "rollouts.parquet").to_pylist()
    assert [row["k"] for row in rows] == [8, 8, 0]
    assert rows[0]["topk_ids"][7] == made[0].topk.ids[7].tolist()
    assert rows[2]["topk_ids"] is rows[2]["topk_tail_logp"] is None
    with ScoreStore(tmp_path / "back", mode="a", codec=codec) as store:
        assert import_parquet(tmp_path / "out" / "rollouts.parquet", store).records == 2
        found = store.get_rollouts(student, ids[:6], 2, params, k=8, version="w", occurrence=4)
        assert all(same(one.topk, other.topk) for one, other in zip(found, kept, strict=True))
        assert all(one.logp.tobytes() == other.logp.tobytes() for one, other in zip(found, kept, strict=True))
        assert found[0].sampling == params
        assert store.get_rollouts(student, ids[:4], None, params)[0].topk is None
    assert contents(tmp_path / "cache") == contents(tmp_path / "back"), "byte for byte"


def test_rollout_rows_that_do_not_fit_are_named_and_the_rest_goes_in(tmp_path):
    params = SamplingParams(max_tokens=4, seed=1)
    with ScoreStore(tmp_path / "cache", mode="a") as store:
        for first in range(5):
            rollout = Rollout(np.array([first, 2]), np.array([3]), np.float32([-1.0]), "stop", params)
            store.put_rollouts(TeacherIdentity("s"), [first, 2], [rollout], params)
    export_parquet(tmp_path / "cache", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "rollouts.parquet").to_pylist()
    rows[0]["policy"] = None
    rows[1]["request"] = "abc"
    rows[2]["logp"] = [-1.0, -2.0]
    rows[3]["sampling"] = "{}"
    with ScoreStore(tmp_path / "back", mode="a") as store:
        done = import_rollouts(rows, store, where="f")
        assert len(store) == 1
    assert (done.records, done.tokens) == (1, 1)
    assert [text.split(":")[0] for text in done.refused] == [f"f, row {number}" for number in range(4)]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("finish_reason", None), ("finish_reason", "eos"), ("version", None), ("version", 3), ("k", 2**40),
        ("prompt_ids", [2**40]), ("prompt_ids", [1.5]), ("completion_ids", [2**40]), ("completion_ids", [1.5]),
    ],
)  # fmt: skip
def test_a_rollout_that_no_policy_can_have_drawn_is_refused_unrounded(tmp_path, column, value):
    params = SamplingParams(max_tokens=4, seed=1)
    rollout = Rollout(np.array([1]), np.array([3]), np.float32([-1.0]), "stop", params)
    with ScoreStore(tmp_path / "cache", mode="a") as store:
        for seed in range(2):
            store.put_rollouts(TeacherIdentity("s"), [1], [rollout], params, version=str(seed))
    export_parquet(tmp_path / "cache", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "rollouts.parquet").to_pylist()
    rows[0][column] = value
    with ScoreStore(tmp_path / "back", mode="a") as store:
        done = import_rollouts(rows, store, where="f")
        assert done.records == len(store) == 1
    assert [text.split(":")[0] for text in done.refused] == ["f, row 0"]
