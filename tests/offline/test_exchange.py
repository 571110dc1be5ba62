"""Parquet and datasets hold everything, and give everything back."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.offline.samples import checked, same, scored
from topkd.offline import (
    ScoreStore,
    TeacherIdentity,
    export_parquet,
    from_dataset,
    import_parquet,
    to_dataset,
)
from topkd.topk import Rollout, SamplingParams
from topkd.topk.errors import CacheError, DataError

pq = pytest.importorskip("pyarrow.parquet")

TEACHER = TeacherIdentity("teacher", revision="r")


@pytest.fixture
def filled(tmp_path):
    data = [scored(seed, tokens=20 + seed, odd=True) for seed in range(5)]
    with ScoreStore(tmp_path / "cache", mode="a", codec="raw") as store:
        for ids, scores in data:
            store.put(TEACHER, ids, scores)
        ids, scores = data[0]
        rollout = Rollout(ids[:6], ids[6:], scores.actual_logp, "stop", SamplingParams(seed=2), scores, "v1")
        store.put_rollouts(TEACHER, ids[:6], [rollout, rollout], SamplingParams(seed=2))
    return tmp_path / "cache", data


def test_parquet_has_the_documented_columns_and_gives_everything_back(filled, tmp_path):
    cache, data = filled
    done = export_parquet(cache, tmp_path / "out")
    assert (done.records, done.refused) == (6, [])
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.schema.names == [
        "teacher", "ids", "start", "k", "codec", "actual_ids", "actual_logp", "tail_logp", "topk_ids", "topk_logp",
    ]  # fmt: skip
    row = table.slice(1, 1).to_pylist()[0]
    ids, scores = data[1]
    assert json.loads(row["teacher"])["revision"] == "r"
    assert row["ids"] == ids.tolist()
    assert row["topk_ids"][0] == []  # the hole
    assert row["topk_ids"][7] == scores.ids[7].tolist()
    assert np.float32(row["topk_logp"][2][-1]) == -np.inf
    with ScoreStore(tmp_path / "back", mode="a", codec="raw") as store:
        assert import_parquet(tmp_path / "out", store).records == 6
        for ids, scores in data:
            found = store.get(TEACHER, ids, 5, 8)
            assert same(checked(found), scores)
    rollouts = pq.read_table(tmp_path / "out" / "rollouts.parquet").to_pylist()
    assert [r["version"] for r in rollouts] == ["v1", "v1"]
    assert np.array(rollouts[0]["logp"], np.float32).tobytes() == data[0][1].actual_logp.tobytes()
    assert json.loads(rollouts[0]["sampling"])["seed"] == 2


def test_an_export_leaves_nothing_of_an_earlier_one_and_nothing_half_written(filled, tmp_path, monkeypatch):
    cache, data = filled
    export_parquet(cache, tmp_path / "out")
    with ScoreStore(tmp_path / "other", mode="a") as store:
        store.put(TEACHER, *data[1])
    export_parquet(tmp_path / "other", tmp_path / "out")
    with ScoreStore(tmp_path / "back", mode="a") as store:
        assert import_parquet(tmp_path / "out", store).records == 1, "no rollout of the first"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (tmp_path / "out" / "scores.parquet").read_bytes()
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(CacheError, match=r"cannot export there.*No space left") as caught:
        export_parquet(cache, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.parquet"]
    assert (tmp_path / "out" / "scores.parquet").read_bytes() == before


def test_a_dataset_round_trips(filled, tmp_path):
    pytest.importorskip("datasets")
    cache, data = filled
    dataset = to_dataset(cache)
    assert len(dataset) == 5
    with ScoreStore(tmp_path / "back", mode="a", codec="raw") as store:
        assert from_dataset(dataset, store).records == 5
        assert all(same(store.get(TEACHER, ids, 5, 8), scores) for ids, scores in data)


def test_an_empty_cache_exports_nothing_and_makes_an_empty_dataset(tmp_path):
    ScoreStore(tmp_path / "cache", mode="a").close()
    assert export_parquet(tmp_path / "cache", tmp_path / "out").records == 0
    assert list((tmp_path / "out").iterdir()) == []
    assert len(to_dataset(tmp_path / "cache")) == 0


def test_rows_that_do_not_fit_are_named_and_the_rest_goes_in(filled, tmp_path):
    cache, _ = filled
    rows = to_dataset(cache).to_list()
    rows[1]["ids"] = rows[1]["ids"][:-1]
    rows[2]["topk_logp"][3][0] = 5.0
    del rows[3]["topk_ids"]
    with ScoreStore(tmp_path / "back", mode="a") as store:
        done = from_dataset(rows, store)
        assert done.records == 2
        assert [text.split(":")[0] for text in done.refused] == [f"dataset, row {n}" for n in (1, 2, 3)]
        assert len(store) == 2


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("k", 2**40), ("k", -1), ("k", 6.5), ("start", 2**40), ("ids", 2**40), ("ids", 1.5), ("topk_ids", 2**40),
        ("topk_ids", 1.5), ("actual_ids", 2**40), ("actual_ids", 1.5),
    ],
)  # fmt: skip
def test_a_number_that_is_no_id_or_fits_nowhere_is_its_rows_fault_alone_and_never_cut(filled, tmp_path, column, value):
    cache, _ = filled
    rows = to_dataset(cache).to_list()
    inner = rows[1][column]
    while isinstance(inner, list) and isinstance(inner[0], list):
        inner = inner[5]  # of a row that has a list
    if isinstance(inner, list):
        inner[0] = value
    else:
        rows[1][column] = value
    with ScoreStore(tmp_path / "back", mode="a") as store:
        done = from_dataset(rows, store)
        assert (done.records, len(store)) == (4, 4)
    assert [text.split(":")[0] for text in done.refused] == ["dataset, row 1"]


def test_a_file_without_the_columns_is_refused(tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    with ScoreStore(tmp_path / "back", mode="a") as store:
        with pytest.raises(DataError, match="lacks columns"):
            import_parquet(tmp_path / "x.parquet", store)
        with pytest.raises(DataError, match="no such file or folder"):
            import_parquet(tmp_path / "none", store)
        with pytest.raises(DataError, match="no Parquet file of scores"):
            import_parquet(tmp_path / "back", store)


def test_the_room_loads_no_heavy_package():
    heavy = ("pyarrow", "datasets", "torch", "yaml", "httpx")
    code = f"import sys, topkd.offline; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
