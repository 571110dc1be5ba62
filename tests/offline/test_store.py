"""What the store answers, to whom, and what it refuses."""

from __future__ import annotations

import os
import pickle
import threading
from bisect import bisect_left

import numpy as np
import pytest

from tests.offline.samples import checked, same, scored
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store import index, segments
from topkd.offline.store.keys import check_token_array, compute_rollout_key, compute_score_key
from topkd.offline.store.records import ROLLOUT, SCORE
from topkd.topk import Rollout, SamplingParams, TopK
from topkd.topk.errors import AlignmentError, CacheError, ConfigError, DataError, TopkdError

TEACHER = TeacherIdentity("teacher", revision="abc")


def test_a_bare_name_stands_for_a_teacher(tmp_path):
    store = ScoreStore(tmp_path, mode="a")
    ids, scores = scored(1)
    store.put("plain-name", ids.tolist(), scores)
    assert store.get("plain-name", ids.tolist(), 5, 8) is not None
    store.close()


@pytest.mark.parametrize("codec", ["raw", "packed", "cold"])
def test_what_was_put_is_found_before_and_after_commit_close_and_reopening(tmp_path, codec):
    data = [scored(seed, tokens=20 + seed, odd=True) for seed in range(5)]

    def all_there(store):
        for ids, scores in data:
            found = store.get(TEACHER, ids, 5, 8)
            assert checked(found) == found
            assert found.tail_logp.tobytes() == scores.tail_logp.tobytes()
            assert np.array_equal(found.ids, scores.ids)
            assert same(found, scores) or codec != "raw"
        assert len(store) == 5

    store = ScoreStore(tmp_path, mode="a", codec=codec)
    for ids, scores in data:
        store.put(TEACHER, ids, scores)
    all_there(store)
    assert store.commit() == 5
    with ScoreStore(tmp_path) as reader:
        all_there(reader)
    store.close()
    all_there(store)
    with ScoreStore(tmp_path) as reader:
        all_there(reader)


def test_a_narrower_k_and_a_later_start_are_hits_and_a_wider_one_is_not(tmp_path):
    ids, scores = scored(2)
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        store.put(TEACHER, ids, scores)
        for start in range(5, 40):
            for k in range(1, 9):
                assert same(store.get(TEACHER, ids, start, k), scores.slice(slice(start - 5, None), k=k))
        assert store.get(TEACHER, ids, 4, 8) is None
        assert store.get(TEACHER, ids, 5, 9) is None
        assert store.get(TEACHER, ids[:-1], 5, 8) is None
        assert store.get(TeacherIdentity("teacher", revision="abd"), ids, 5, 8) is None


def test_the_widest_record_answers(tmp_path):
    ids, wide = scored(3, k=8, start=5)
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        store.put(TEACHER, ids, wide.slice(k=3))
        store.put(TEACHER, ids, wide)
        store.put(TEACHER, ids, wide.slice(k=5))  # already answered: not written
        store.put(TEACHER, ids, wide.slice(slice(4, None)))
        assert len(list(store.records(live=False))) == 2
        assert same(store.get(TEACHER, ids, 5, 3), wide.slice(k=3))
        assert same(store.get(TEACHER, ids, 7, 8), wide.slice(slice(2, None)))
        assert len(list(store.records())) == 1  # the narrower one is superseded
        assert store.list_stored(TEACHER, ids) == [(5, 3), (5, 8)]


def test_incomparable_records_of_one_key_are_both_kept(tmp_path):
    ids, wide = scored(4, k=8, start=5)
    late = wide.slice(slice(10, None))
    early = wide.slice(k=3)
    with ScoreStore(tmp_path, mode="a", codec="raw") as store:
        store.put(TEACHER, ids, early)
        store.put(TEACHER, ids, late)
        assert same(store.get(TEACHER, ids, 6, 3), early.slice(slice(1, None)))
        assert same(store.get(TEACHER, ids, 20, 8), late.slice(slice(5, None)))
        assert store.get(TEACHER, ids, 6, 8) is None


def test_a_server_that_gives_fewer_columns_than_asked_is_not_asked_again(tmp_path):
    ids, scores = scored(5, k=5)
    with ScoreStore(tmp_path, mode="a") as store:
        store.put(TEACHER, ids, scores, asked=20)
        assert store.get(TEACHER, ids, 5, 20).k == 5
        assert store.get(TEACHER, ids, 5, 21) is None


def test_every_part_of_an_identity_and_every_token_changes_the_key():
    ids = np.arange(5, dtype=np.int32)
    variants = [
        TeacherIdentity("a"),
        TeacherIdentity("b"),
        TeacherIdentity("a", revision="1"),
        TeacherIdentity("a", tokenizer="1"),
        TeacherIdentity("a", context="1"),
        TeacherIdentity("a", semantics="tempered"),
    ]
    keys = {compute_score_key(variant, ids) for variant in variants}
    keys |= {compute_score_key(variants[0], other) for other in (ids[:-1], ids[::-1].copy(), ids + 1)}
    assert len(keys) == 9
    params = SamplingParams()
    sampled = {
        compute_rollout_key(variants[0], ids, params),
        compute_rollout_key(variants[0], ids, params, version="1"),
        compute_rollout_key(variants[0], ids, params, occurrence=1),
        compute_rollout_key(variants[0], ids, SamplingParams(seed=1)),
        compute_rollout_key(variants[0], ids, SamplingParams(top_p=0.9)),
    }
    assert len(sampled) == 5
    assert not keys & sampled


def test_keys_do_not_depend_on_how_ids_are_given():
    forms = ([1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint16), np.array([9, 1, 2, 3])[1:])
    assert len({compute_score_key(TEACHER, check_token_array(form)) for form in forms}) == 1


def test_an_identity_is_never_a_url():
    with pytest.raises(ConfigError, match="is a URL") as error:
        TeacherIdentity("https://user:secret@host/v1")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="has no name"):
        TeacherIdentity(" ")


@pytest.mark.parametrize(
    ("ids", "error"),
    [([], DataError), ([1.5], DataError), ([-1, 2], DataError), ([2**31], DataError), ([[1]], DataError)],
)
def test_ids_that_are_no_token_ids_are_refused(tmp_path, ids, error):
    with ScoreStore(tmp_path, mode="a") as store, pytest.raises(error):
        store.get(TEACHER, ids, 0, 1)


def test_scores_of_another_sequence_or_that_stop_short_are_refused(tmp_path):
    ids, scores = scored(6)
    with ScoreStore(tmp_path, mode="a") as store:
        with pytest.raises(AlignmentError, match="another sequence"):
            store.put(TEACHER, np.roll(ids, 1), scores)
        with pytest.raises(AlignmentError, match="do not reach"):
            store.put(TEACHER, np.append(ids, 1), scores)
        with pytest.raises(ConfigError, match="start out of range"):
            store.get(TEACHER, ids, 40, 1)
        assert len(store) == 0
    assert not list(tmp_path.glob("seg-*"))


def test_a_reader_does_not_write_and_a_missing_cache_is_named(tmp_path):
    with pytest.raises(CacheError, match="no such file or folder") as error:
        ScoreStore(tmp_path / "none")
    assert str(tmp_path / "none") in str(error.value)
    ScoreStore(tmp_path, mode="a").close()
    with ScoreStore(tmp_path) as store, pytest.raises(CacheError, match="open for reading"):
        store.put(TEACHER, *scored(1))
    with pytest.raises(ConfigError, match="cache mode"):
        ScoreStore(tmp_path, mode="w")
    with pytest.raises(ConfigError, match="cache codec"):
        ScoreStore(tmp_path, codec="zip")


def test_another_process_sees_records_after_refresh_and_a_copy_of_the_store_travels(tmp_path):
    writer = ScoreStore(tmp_path, mode="a")
    reader = pickle.loads(pickle.dumps(ScoreStore(tmp_path)))
    ids, scores = scored(7)
    writer.put(TEACHER, ids, scores)
    assert reader.get(TEACHER, ids, 5, 8) is None
    reader.refresh()
    assert reader.get(TEACHER, ids, 5, 8) is not None
    more, other = scored(8)
    writer.put(TEACHER, more, other)
    writer.close()
    reader.refresh()
    assert reader.get(TEACHER, more, 5, 8) is not None
    assert len(reader) == 2
    reader.close()


def test_a_forked_child_writes_into_a_segment_of_its_own(tmp_path):
    store = ScoreStore(tmp_path, mode="a")
    store.put(TEACHER, *scored(1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.put(TEACHER, *scored(2))
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    store.put(TEACHER, *scored(3))
    store.close()
    assert len(list(tmp_path.glob("*.tkl"))) == 2
    with ScoreStore(tmp_path) as reader:
        assert len(reader) == 3
    assert ScoreStore(tmp_path).verify().damage == []


def test_threads_may_share_a_store(tmp_path):
    errors = []
    with ScoreStore(tmp_path, mode="a", segment_bytes=30_000, group_records=3) as store:

        def work(first):
            try:
                for seed in range(first, first + 15):
                    ids, scores = scored(seed, vocabulary=1_000)
                    store.put(TEACHER, ids, scores)
                    assert store.get(TEACHER, ids, 5, 8).actual_logp.tobytes() == scores.actual_logp.tobytes()
            except (AssertionError, TopkdError, OSError) as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10, 20, 30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(store) == 45
    verification = store.verify()
    assert (verification.records, verification.duplicates, verification.damage) == (45, 0, [])


def test_many_segments_are_searched_as_one(tmp_path):
    data = [scored(seed, tokens=12, k=3, vocabulary=500) for seed in range(60)]
    with ScoreStore(tmp_path, mode="a", segment_bytes=1_000) as store:
        for ids, scores in data:
            store.put(TEACHER, ids, scores)
    assert len(list(tmp_path.glob("*.idx"))) > 15
    with ScoreStore(tmp_path) as store:
        for _ in range(3):
            for ids, scores in data:
                assert store.get(TEACHER, ids, 5, 3).actual_logp.tobytes() == scores.actual_logp.tobytes()
            assert store.get(TEACHER, scored(99)[0], 5, 3) is None
        assert len(store) == 60
        assert [record.header.kind for record in store.records()] == [SCORE] * 60


def test_rollouts_come_back_exact_with_their_lists(tmp_path):
    ids, lists = scored(9, odd=True)
    params = SamplingParams(max_tokens=34, stop_token_ids=(7, 8), seed=4)
    drawn = [
        Rollout(ids[:6], ids[6:], lists.actual_logp, "stop", params, lists, "v3"),
        Rollout(ids[:6], ids[6:9], lists.actual_logp[:3], "length", params, None, "v3"),
        Rollout(ids[:6], ids[:0], lists.actual_logp[:0], "abort", params),
    ]
    for codec in ("raw", "packed", "cold"):
        with ScoreStore(tmp_path / codec, mode="a", codec=codec) as store:
            store.put_rollouts(TEACHER, ids[:6], drawn, params, k=8)
            found = store.get_rollouts(TEACHER, ids[:6], 3, params, k=8)
            for back, original in zip(found, drawn, strict=True):
                assert back.logp.tobytes() == original.logp.tobytes()
                assert back.completion_ids.tolist() == original.completion_ids.tolist()
                assert (back.finish_reason, back.version, back.sampling) == (
                    original.finish_reason,
                    original.version,
                    original.sampling,
                )
            assert np.array_equal(found[0].topk.ids, lists.ids)
            assert found[0].topk.tail_logp.tobytes() == lists.tail_logp.tobytes()
            assert same(found[0].topk, lists) or codec != "raw"
            assert len(store.get_rollouts(TEACHER, ids[:6], 2, params)) == 2
            assert store.get_rollouts(TEACHER, ids[:6], 4, params) is None
            assert store.get_rollouts(TEACHER, ids[:6], 1, params, k=9) is None
            assert store.get_rollouts(TEACHER, ids[:6], 1, SamplingParams(seed=5)) is None
            assert len(list(store.records(kinds=(SCORE, ROLLOUT)))) == 1


def test_scalar_and_list_runs_replay_the_same_record(tmp_path):
    ids, scores = scored(10)
    with ScoreStore(tmp_path, mode="a") as store:
        store.put(TEACHER, ids, scores)
        scalar = store.get(TEACHER, ids, 5, 0)
        assert scalar.k == 0
        assert scalar.actual_logp.tobytes() == store.get(TEACHER, ids, 5, 8).actual_logp.tobytes()
        assert isinstance(scalar, TopK)


def test_reading_costs_the_same_whatever_the_number_of_records(tmp_path, monkeypatch):
    """Searches of an index, and bytes of records, for a read from a store of 300 and from one of 30,000."""
    searches, read = [0], [0]

    def bisect(*args):
        searches[0] += 1
        return bisect_left(*args)

    def taken(segment, offset, size):
        read[0] += size
        return bytes_of(segment, offset, size)

    bytes_of = segments.Segment._bytes
    monkeypatch.setattr(index, "bisect_left", bisect)
    monkeypatch.setattr(segments.Segment, "_bytes", taken)
    ids, scores = scored(11, tokens=8, k=2, vocabulary=100)
    cost = {}
    for records in (300, 30_000):
        root = tmp_path / str(records)
        with ScoreStore(root, mode="a", group_bytes=1 << 30, group_records=1 << 30, segment_bytes=1 << 17) as store:
            for number in range(records):
                changed = ids.copy()
                changed[:2] = divmod(number, 30_000)
                store.put(TEACHER, changed, scores)
        store, rng = ScoreStore(root), np.random.default_rng(0)
        for turn in range(400):
            if turn == 200:  # by then many segments have been joined
                searches[0] = read[0] = 0
            changed = ids.copy()
            changed[:2] = divmod(int(rng.integers(records)), 30_000)
            assert store.get(TEACHER, changed, 5, 2) is not None
        cost[records] = searches[0], read[0]
    segments_of = list(root.glob("seg-*.tkl"))
    assert len(segments_of) > 20
    assert cost[30_000][0] == cost[300][0] == 200, "one search a read, however many segments"
    assert cost[30_000][1] <= 200 * 1.1 * sum(file.stat().st_size for file in segments_of) / 30_000, "the record alone"
