"""docs/format.md is complete: a reader written from it alone finds every byte."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from tests.offline import reader
from tests.offline.samples import scored
from topkd.offline import ScoreStore, TeacherIdentity
from topkd.offline.store.codecs import CODECS
from topkd.topk import Rollout, SamplingParams

TEACHER = TeacherIdentity("täacher", revision="r1", tokenizer="t", context="c")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("vocabulary", [5_000, 151_936, 300_000, 20_000_000])
@pytest.mark.parametrize("sealed", [True, False])
def test_the_independent_reader_gets_what_the_store_gives(tmp_path, codec, vocabulary, sealed):
    data = [scored(seed, k=5, start=seed, vocabulary=vocabulary, odd=True) for seed in range(4)]
    store = ScoreStore(tmp_path, mode="a", codec=codec)
    for ids, scores in data:
        store.put(TEACHER, ids, scores)
    store.commit()
    if sealed:
        store.close()
    found = {record["key"]: record for record in reader.records(tmp_path)}
    names = [json.loads(record["payload"]) for record in found.values() if record["kind"] == 3]
    assert names == [json.loads(TEACHER.to_json())]
    for ids, scores in data:
        record = found[reader.compute_score_key(TEACHER.to_json().encode(), ids)]
        got_ids, actual, actual_logp, tail, top, logp = reader.score(record)
        expected = store.get(TEACHER, ids, scores.start, scores.k)
        assert np.array_equal(got_ids, ids)
        assert np.array_equal(actual, expected.actual_ids)
        assert actual_logp.tobytes() == scores.actual_logp.tobytes()
        assert tail.tobytes() == scores.tail_logp.tobytes()
        assert np.array_equal(top, scores.ids)
        assert logp.tobytes() == expected.logp.tobytes()
    store.close()


def test_the_independent_reader_finds_rollouts_where_the_document_says(tmp_path):
    ids, lists = scored(1)
    rollout = Rollout(ids[:6], ids[6:], lists.actual_logp, "stop", SamplingParams(seed=3), lists, "v2")
    with ScoreStore(tmp_path, mode="a") as store:
        store.put_rollouts(TEACHER, ids[:6], [rollout, rollout], SamplingParams(seed=3), k=8)
    (record,) = [record for record in reader.records(tmp_path) if record["kind"] == 2]
    payload = record["payload"]
    head = 4 + int.from_bytes(payload[:4], "little")
    entry = json.loads(payload[4:head])["rollouts"][1]
    assert record["start"] == 2
    assert entry["version"] == "v2"
    size = entry["lists"]["size"]
    at = head + 4 * (6 + 34 + 34) + size + -size % 4  # the second rollout
    assert np.frombuffer(payload, "<i4", 6, at).tolist() == ids[:6].tolist()
    assert np.frombuffer(payload, "<f4", 34, at + 4 * 40).tobytes() == lists.actual_logp.tobytes()
    described = {**entry["lists"], "high": entry["lists"]["high_bits"], "payload": payload[at + 4 * 74 :][:size]}
    assert np.array_equal(reader.score(described)[4], lists.ids)


def test_the_independent_reader_is_independent():
    tree = ast.parse(Path(reader.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"hashlib", "struct", "pathlib", "numpy", "xxhash", "zstandard"}
