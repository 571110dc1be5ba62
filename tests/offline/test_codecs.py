"""Every codec keeps what must be exact, and returns a TopK that the constructor would accept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.offline.samples import checked, same, scored
from topkd.offline.store.codecs import ACTUAL_IS_NEXT, CODECS, HAS_PADS, PLAIN, decode, encode, narrow_scores
from topkd.topk import TopK
from topkd.topk.errors import CacheCorruptError, ResponseError


def roundtrip(ids, scores, codec):
    shape, payload = encode(ids, scores, codec)
    back_ids, back = decode(shape, memoryview(payload))
    assert np.array_equal(back_ids, ids)
    return back


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("k", [0, 1, 3, 5, 64])
@pytest.mark.parametrize("tokens", [6, 7, 23])
def test_all_but_the_lists_logprobs_is_exact_at_odd_shapes(codec, k, tokens):
    ids, scores = scored(1, tokens=tokens, k=k, start=5, odd=True)
    back = roundtrip(ids, scores, codec)
    for name in ("ids", "actual_ids", "actual_logp", "tail_logp"):
        assert getattr(back, name).tobytes() == getattr(scores, name).tobytes(), name
    assert checked(back) == back


def test_raw_is_bit_exact_and_a_view_of_the_bytes():
    ids, scores = scored(2, odd=True)
    shape, payload = encode(ids, scores, "raw")
    back = decode(shape, memoryview(payload))[1]
    assert same(back, scores)
    whole = np.frombuffer(payload, np.uint8)
    assert np.shares_memory(back.logp, whole)
    assert np.shares_memory(back.ids, whole)


def test_cold_holds_what_packed_holds():
    ids, scores = scored(3, k=20, odd=True)
    assert same(roundtrip(ids, scores, "cold"), roundtrip(ids, scores, "packed"))


def test_packing_what_was_packed_changes_nothing():
    ids, scores = scored(4, k=64, odd=True)
    once = roundtrip(ids, scores, "packed")
    assert same(roundtrip(ids, once, "cold"), once)
    assert same(roundtrip(ids, once, "packed"), once)


@pytest.mark.parametrize("vocabulary", [100, 65_534, 65_535, 65_536, 262_142, 262_143, 262_144, 1 << 24, 2**31 - 1])
@pytest.mark.parametrize("codec", ["packed", "cold"])
def test_ids_of_any_size_survive_beside_pads(vocabulary, codec):
    ids = np.array([0, vocabulary - 1, vocabulary // 2], np.int32)
    top = np.array([[vocabulary - 1, 0], [vocabulary - 1, -1]], np.int32)
    logp = np.array([[-0.5, -3.0], [-0.25, -np.inf]], np.float32)
    scores = TopK(0, top, logp, ids[1:], np.array([-1.0, -2.0]), np.array([-1.5, np.nan]))
    shape, payload = encode(ids, scores, codec)
    assert shape.flags == ACTUAL_IS_NEXT | HAS_PADS  # not PLAIN: a pad is -inf
    assert decode(shape, memoryview(payload))[1].ids.tolist() == top.tolist()


def test_unknown_realised_ids_are_kept_apart_from_the_sequence():
    ids, scores = scored(5)
    unknown = TopK(5, scores.ids, scores.logp, np.full(scores.rows, -1), scores.actual_logp, scores.tail_logp)
    for codec in CODECS:
        assert roundtrip(ids, unknown, codec).actual_ids.tolist() == [-1] * scores.rows


@pytest.mark.parametrize("k", [3, *range(20, 140, 7), 1000])
def test_rounding_never_makes_mass_that_the_constructor_refuses(k):
    # log(1/k) rounds upwards for some k: naively the row would have a mass up to 1.002.
    logp = np.full((2, k), -np.log(k), np.float32)
    ids = np.arange(3, dtype=np.int32)
    top = np.tile(np.arange(k, dtype=np.int32), (2, 1))
    scores = TopK(0, top, logp, ids[1:], np.zeros(2), np.full(2, -np.inf))
    back = checked(roundtrip(ids, scores, "packed"))
    assert np.abs(back.logp - logp).max() <= 2**-10 * np.abs(logp).max() + 1e-7


def test_naive_rounding_would_have_been_refused():
    refused = 0
    for k in range(20, 140):
        logp = np.full((1, k), -np.log(k), np.float32).astype(np.float16).astype(np.float32)
        if np.exp(logp.astype(float)).sum() > 1.001:
            refused += 1
            with pytest.raises(ResponseError, match="mass above"):
                TopK(0, np.arange(k)[None], logp, np.array([1]), np.array([-1.0]), np.array([-np.inf]))
    assert refused > 20


def test_a_slightly_positive_logprob_stays_within_tolerance():
    scores = TopK(0, [[7]], np.array([[9.99e-4]]), [1], [0.0], [np.nan])
    assert checked(roundtrip(np.array([0, 1], np.int32), scores, "packed")).logp[0, 0] <= 9.99e-4


@pytest.mark.parametrize("codec", ["packed", "cold"])
def test_every_fp16_decodes_to_its_value_with_and_without_the_table(codec):
    every = -np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all finite negatives, descending
    near, ids = every[:, None], np.arange(len(every) + 1, dtype=np.int32)
    unknown = np.full(len(every), np.nan)
    plain = TopK(0, np.ones(near.shape, np.int32), near, ids[1:], unknown, unknown)
    assert encode(ids, plain, codec)[0].flags & PLAIN
    assert np.array_equal(roundtrip(ids, plain, codec).logp, near)
    with_zero = near.copy()
    with_zero[7] = -np.inf
    tabled = TopK(0, np.ones(near.shape, np.int32), with_zero, ids[1:], unknown, unknown)
    assert not encode(ids, tabled, codec)[0].flags & PLAIN
    assert np.array_equal(roundtrip(ids, tabled, codec).logp, with_zero)


def test_a_finite_logprob_beyond_fp16_is_written_raw_and_never_becomes_zero_probability():
    ids, scores = scored(6, k=4)
    logp = scores.logp.copy()
    logp[3, -1] = -70_000.0
    far = TopK(5, scores.ids, logp, scores.actual_ids, scores.actual_logp, scores.tail_logp)
    shape, _ = encode(ids, far, "packed")
    assert shape.codec == CODECS["raw"]
    assert same(roundtrip(ids, far, "cold"), far)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=st.floats(-40, 0, width=32)),
    st.sampled_from(["packed", "cold"]),
)
@settings(max_examples=150, deadline=None)
def test_order_survives_and_values_move_by_at_most_one_fp16_step(logp, codec):
    logp = -np.sort(-logp, axis=1)
    logp -= np.maximum(np.log(np.exp(logp.astype(np.float64)).sum(axis=1, keepdims=True)), 0).astype(np.float32)
    rows, k = logp.shape
    top = np.tile(np.arange(k, dtype=np.int32), (rows, 1))
    ids = np.arange(rows + 1, dtype=np.int32)
    scores = TopK(0, top, logp, ids[1:], logp[:, 0], np.full(rows, -2.0))
    back = checked(roundtrip(ids, scores, codec))
    step = np.spacing(np.abs(logp).astype(np.float16)).astype(np.float32)
    assert (np.abs(back.logp - scores.logp) <= step).all()
    assert np.array_equal(back.actual_logp, scores.actual_logp)


@pytest.mark.parametrize("codec", CODECS)
def test_a_payload_of_the_wrong_length_is_corrupt_not_read(codec):
    ids, scores = scored(7)
    shape, payload = encode(ids, scores, codec)
    for wrong in (payload[:-4], payload + bytes(4) if codec != "cold" else payload[: len(payload) // 2]):
        with pytest.raises(CacheCorruptError):
            decode(shape, memoryview(wrong))


def test_narrowing_adds_the_dropped_mass_to_the_tail():
    _, scores = scored(8, k=8)
    cut = narrow_scores(scores, 9, 3)
    expected = np.log(
        np.exp(scores.logp[4:, 3:].astype(np.float64)).sum(1) + np.exp(scores.tail_logp[4:].astype(float))
    )
    assert cut.start == 9
    assert np.allclose(cut.tail_logp, expected, atol=1e-6)
    assert cut.ids.tolist() == scores.ids[4:, :3].tolist()
    assert same(narrow_scores(scores, 5, 8), scores)


def test_an_empty_list_leaves_all_mass_outside():
    _, scores = scored(9, odd=True)
    cut = narrow_scores(scores, 5, 0)
    assert cut.k == 0
    assert np.isnan(cut.tail_logp[0])  # a hole stays one
    assert (cut.tail_logp[1:] == 0).all()
    assert cut.actual_logp.tobytes() == scores.actual_logp.tobytes()


def test_fp16_moves_the_kl_by_a_tenth_of_a_percent_with_the_stored_tail():
    _, teacher = scored(10, tokens=400, k=64)
    _, student = scored(11, tokens=400, k=64)
    ids = scored(10, tokens=400, k=64)[0]
    back = roundtrip(ids, teacher, "packed")

    def kl(t):
        p, tail = np.exp(t.logp.astype(np.float64)), np.exp(t.tail_logp.astype(np.float64))
        other = 0.9 * np.exp(student.logp.astype(np.float64)) + 0.1 * p
        rest = np.maximum(1 - other.sum(1), 1e-9)
        with np.errstate(divide="ignore", invalid="ignore"):
            body = np.where(p > 0, p * (np.log(p) - np.log(other)), 0).sum(1)
            return body + np.where(tail > 0, tail * (np.log(tail) - np.log(rest)), 0)

    exact = kl(teacher)
    assert np.abs(kl(back) - exact).mean() <= 2e-3 * np.abs(exact).mean()
