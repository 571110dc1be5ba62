"""Stats count, verify names, gc and merge lose nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tracemalloc
from gc import collect
from pathlib import Path

import numpy as np
import pytest

from tests.offline.samples import same, scored
from topkd.offline import ScoreStore, TeacherIdentity, gc, merge, profile, stats, verify
from topkd.offline.store import tables
from topkd.offline.store.keys import compute_score_key
from topkd.topk import Rollout, SamplingParams
from topkd.topk.errors import CacheError

A, B = TeacherIdentity("a", revision="1"), TeacherIdentity("b")


def fill(root, teacher, seeds, **options):
    with ScoreStore(root, mode="a", **options) as store:
        for seed in seeds:
            store.put(teacher, *scored(seed, tokens=20 + seed))


def test_stats_count_live_records_tokens_and_teachers(tmp_path):
    fill(tmp_path, A, range(4))
    fill(tmp_path, B, range(2), codec="cold")
    ids, scores = scored(0, tokens=20)
    rollout = Rollout(ids[:6], ids[6:], scores.actual_logp, "stop", SamplingParams())
    with ScoreStore(tmp_path, mode="a") as store:
        store.put_rollouts(A, ids[:6], [rollout] * 3, SamplingParams())
        wide = scored(9, tokens=20, k=12)
        store.put(A, wide[0], wide[1].slice(k=2))
        store.put(A, *wide)
        found = store.stats()
    tokens = sum(14 + seed for seed in (0, 1, 2, 3, 0, 1)) + 3 * 14 + 14
    assert (found.records, found.live, found.scores, found.rollouts, found.tokens) == (9, 8, 7, 3, tokens)
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir() if file.name.startswith("seg-"))
    assert stats(tmp_path).bytes == on_disk
    assert found.k == {8: 6, 12: 1}
    assert found.codecs == {"packed": 6, "cold": 2}
    named = {teacher["name"]: (teacher["revision"], teacher["records"]) for teacher in found.teachers}
    assert named == {"a": ("1", 6), "b": ("", 2)}
    assert found.rows["max"] == 17
    told = json.loads(json.dumps(stats(tmp_path).as_dict()))
    assert {"records", "tokens", "bytes_per_token"} <= set(told)
    assert told["bytes_per_token"] == pytest.approx(on_disk / tokens)


def test_stats_of_an_empty_cache_have_no_ratio(tmp_path):
    ScoreStore(tmp_path, mode="a").close()
    found = stats(tmp_path)
    assert (found.records, found.bytes_per_token, found.rows, found.teachers) == (0, None, {}, [])
    assert verify(tmp_path).ok


def test_gc_drops_superseded_records_and_changes_no_answer(tmp_path):
    wide = {seed: scored(seed, k=8) for seed in range(6)}
    with ScoreStore(tmp_path, mode="a", codec="raw", segment_bytes=4_000) as store:
        for ids, scores in wide.values():
            store.put(A, ids, scores.slice(k=2))
        for ids, scores in wide.values():
            store.put(A, ids, scores)
    assert verify(tmp_path).duplicates == 6
    done = gc(tmp_path)
    assert (done.copied, done.dropped, done.damage) == (6, 6, [])
    assert done.bytes_after < done.bytes_before
    with ScoreStore(tmp_path) as store:
        assert all(same(store.get(A, ids, 5, 8), scores) for ids, scores in wide.values())
        assert len(store) == 6
    after = verify(tmp_path)
    assert (after.records, after.duplicates, after.damage) == (6, 0, [])
    assert stats(tmp_path).teachers[0]["name"] == "a"


def test_gc_can_turn_packed_records_cold_without_changing_a_value(tmp_path):
    ids, scores = scored(1, tokens=300, k=64, odd=True)
    rollout = Rollout(ids[:6], ids[6:], scores.actual_logp, "stop", SamplingParams(), scores)
    with ScoreStore(tmp_path, mode="a") as store:
        store.put(A, ids, scores)
        store.put_rollouts(A, ids[:6], [rollout], SamplingParams(), k=64)
        before = store.get(A, ids, 5, 64)
    done = gc(tmp_path, codec="cold")
    assert done.bytes_after < done.bytes_before
    assert stats(tmp_path).codecs == {"cold": 2}
    with ScoreStore(tmp_path) as store:
        assert same(store.get(A, ids, 5, 64), before)
        assert same(store.get_rollouts(A, ids[:6], 1, SamplingParams(), k=64)[0].topk, before)


def test_gc_leaves_a_live_writer_and_open_readers_alone(tmp_path):
    fill(tmp_path, A, range(3))
    reader, writer = ScoreStore(tmp_path), ScoreStore(tmp_path, mode="a")
    writer.put(B, *scored(7))
    gc(tmp_path)
    writer.put(B, *scored(8))
    assert all(reader.get(A, scored(seed, tokens=20 + seed)[0], 5, 8) is not None for seed in range(3))
    writer.close()
    reader.close()
    with ScoreStore(tmp_path) as store:
        assert len(store) == 5
    assert verify(tmp_path).damage == []


def test_gc_keeps_a_durable_record_that_only_an_uncommitted_one_supersedes(tmp_path):
    ids, wide = scored(1)
    with ScoreStore(tmp_path, mode="a") as store:
        store.put(A, ids, wide.slice(k=2))
    writer = ScoreStore(tmp_path, mode="a")
    writer.put(A, ids, wide)
    assert gc(tmp_path).copied == 1
    with ScoreStore(tmp_path) as store:
        assert store.list_stored(A, ids) == [(5, 2), (5, 8)]
    writer.close()


def test_two_compactions_at_once_are_refused(tmp_path):
    fill(tmp_path, A, range(1))
    fd = os.open(tmp_path / ".gc.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(CacheError, match="another process is compacting"):
        gc(tmp_path)
    os.close(fd)


def test_merge_brings_what_is_missing_once_and_byte_for_byte(tmp_path):
    fill(tmp_path / "x", A, range(4), codec="raw")
    fill(tmp_path / "y", A, range(2, 6), codec="raw")
    fill(tmp_path / "y", B, range(2), codec="raw")
    fill(tmp_path / "z", A, [0], codec="raw")
    done = merge([tmp_path / "x", tmp_path / "y"], tmp_path / "z")
    assert (done.copied, done.dropped) == (7, 3)
    with ScoreStore(tmp_path / "z") as store:
        assert len(store) == 8
        for teacher, seeds in ((A, range(6)), (B, range(2))):
            for seed in seeds:
                ids, scores = scored(seed, tokens=20 + seed)
                assert same(store.get(teacher, ids, 5, 8), scores)
    assert {teacher["name"] for teacher in stats(tmp_path / "z").teachers} == {"a", "b"}
    assert merge([tmp_path / "x", tmp_path / "y"], tmp_path / "z").copied == 0
    assert verify(tmp_path / "x").records == 4


def test_merge_repairs_a_damaged_target_from_a_sound_source(tmp_path):
    for name in "xy":
        fill(tmp_path / name, A, range(3))
    segment = next((tmp_path / "y").glob("*.tkl"))
    whole = bytearray(segment.read_bytes())
    whole[-200] ^= 4
    segment.write_bytes(whole)
    done = merge([tmp_path / "x"], tmp_path / "y")
    assert done.copied == 1
    assert [damage.segment for damage in done.damage] == [segment.name]
    with ScoreStore(tmp_path / "y") as store:
        assert all(store.get(A, scored(seed, tokens=20 + seed)[0], 5, 8) is not None for seed in range(3))


def test_records_stream_in_disk_order_and_can_be_told_apart(tmp_path):
    fill(tmp_path, A, range(5))
    with ScoreStore(tmp_path) as store:
        seen = [record.score() for record in store.records()]
    for seed, (ids, scores) in enumerate(seen):
        original, expected = scored(seed, tokens=20 + seed)
        assert np.array_equal(ids, original)
        assert scores.actual_logp.tobytes() == expected.actual_logp.tobytes()


def test_a_profile_gives_quantiles_of_mass_and_entropy_and_counts_holes(tmp_path):
    ids, scores = scored(1, odd=True)
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        store.put(A, ids, scores)
    found = json.loads(json.dumps(profile(tmp_path)))
    assert (found["scores"], found["rows"], found["holes"]) == (1, 34, 1)
    assert found["mass"][3] == pytest.approx(float(np.median(scores.mass()[1:])))
    bins = np.concatenate([scores.logp, scores.tail_logp[:, None]], 1)[1:].astype(np.float64)
    entropy = [-sum(np.exp(v) * v for v in row if np.isfinite(v)) for row in bins]
    assert found["entropy"][3] == pytest.approx(float(np.median(entropy)))
    assert found["lengths"][0] == 34
    ScoreStore(tmp_path / "empty", mode="a").close()
    assert profile(tmp_path / "empty")["mass"] == []


def test_what_another_machine_left_is_read_but_not_sealed_unless_told(tmp_path, monkeypatch):
    monkeypatch.setattr("topkd.offline.store.segment_writer.find_host_id", lambda: 7)
    away = ScoreStore(tmp_path / "live", mode="a")
    away.put(A, *scored(1))
    away.commit()
    shutil.copytree(tmp_path / "live", tmp_path / "shared")  # the copy has no lock
    away.close()
    monkeypatch.undo()
    with ScoreStore(tmp_path / "shared", mode="a") as store:
        assert store.get(A, scored(1)[0], 5, 8) is not None
    assert not list((tmp_path / "shared").glob("*.idx"))
    assert gc(tmp_path / "shared").copied == 0
    assert gc(tmp_path / "shared", foreign=True).copied == 1
    assert verify(tmp_path / "shared").damage == []


def _records(root):
    """Key and payload of every record, in the order in which they are on the disk."""
    with ScoreStore(root) as store:
        return [(record.header.key, bytes(record.payload)) for record in store.records(live=False)]


@pytest.mark.parametrize("part_rows", [1, 3, 1 << 17])
def test_in_however_many_parts_the_keys_are_compared_the_same_records_stay_in_the_same_order(
    part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("x", "y"):
        fill(tmp_path / name, A, range(12), codec="raw", segment_bytes=3_000)
        with ScoreStore(tmp_path / name, mode="a", codec="raw", segment_bytes=3_000) as store:
            for seed in range(4, 9):  # wider ones of some keys: the first become superfluous
                store.put(A, *scored(seed, tokens=20 + seed, k=12))
    fill(tmp_path / "y", A, range(20, 23), codec="raw")
    wanted = [
        scored(seed, tokens=20 + seed, k=12 if 4 <= seed < 9 else 8)
        for seed in (*range(4), *range(9, 12), *range(4, 9))
    ]
    shutil.copytree(tmp_path / "x", tmp_path / "at-once")
    gc(tmp_path / "at-once")
    monkeypatch.setattr(tables, "PART_ROWS", part_rows)
    assert (gc(tmp_path / "x").copied, gc(tmp_path / "x").dropped) == (12, 0)
    with ScoreStore(tmp_path / "x") as store:
        assert all(same(store.get(A, ids, 5, scores.k), scores) for ids, scores in wanted)
    assert _records(tmp_path / "x") == _records(tmp_path / "at-once")
    assert {key for key, _ in _records(tmp_path / "x")} == {compute_score_key(A, ids) for ids, _ in wanted}
    assert merge([tmp_path / "x", tmp_path / "y"], tmp_path / "z").copied == 15
    assert _records(tmp_path / "z")[:12] == _records(tmp_path / "x")
    assert len({key for key, _ in _records(tmp_path / "z")}) == 15


def _traced_peak(work) -> int:
    collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_gc_and_merge_does_not_grow_with_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "PART_ROWS", 150)
    ids, scores = scored(0, tokens=8, k=2)
    peaks = {}
    for count in (300, 1_200):
        root, target = tmp_path / str(count), tmp_path / f"merged-{count}"
        with ScoreStore(root, mode="a", codec="raw", segment_bytes=30_000, group_records=1_000) as store:
            for number in range(count):
                store.put(A, np.array([*ids[:4], number, *ids[5:]], np.int32), scores)
        peaks["gc", count] = _traced_peak(lambda root=root: gc(root, segment_bytes=30_000))
        peaks["merge", count] = _traced_peak(
            lambda root=root, target=target: merge([root], target, segment_bytes=30_000)
        )
        assert stats(target).live == count
    for command in ("gc", "merge"):
        grown = peaks[command, 1_200] - peaks[command, 300]
        assert grown < 900 * 16, "a row of the tables alone has 56 bytes, and there were five copies of them"
