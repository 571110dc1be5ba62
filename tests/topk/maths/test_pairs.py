"""GJS of two lists that name different ids."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.topk import reference
from tests.topk.lists import as_dict, random_logp, topk_of
from topkd.topk import TopK, gjs, topk_gjs
from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.maths.pairs import _exact
from topkd.topk.maths.union import BLOCK_SLOTS, UnionTail

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def correlated(rng: np.random.Generator, rows: int, vocab: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    shared = rng.normal(size=(rows, vocab))
    sides = [scale * (shared + rng.normal(size=shared.shape) * 0.6) for _ in range(2)]
    return tuple(z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
                 for z in sides)  # fmt: skip


def ragged(rng: np.random.Generator, scores: TopK) -> TopK:
    """Cuts every row to a length of its own, puts holes and exact zeros in."""
    keep = rng.integers(0, scores.k + 1, size=scores.rows)
    pad = np.arange(scores.k) >= keep[:, None]
    logp = np.where(pad, -np.inf, scores.logp)
    zero = (rng.random(scores.rows) < 0.2) & (keep > 1)
    logp[zero, keep[zero] - 1] = -np.inf
    return TopK(
        0,
        np.where(pad, -1, scores.ids).astype(np.int32),
        logp.astype(np.float32),
        scores.actual_ids,
        scores.actual_logp,
        np.full(scores.rows, np.nan, dtype=np.float32),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("teacher_k", "student_k"), [(1, 1), (20, 20), (3, 17), (64, 20)])
@pytest.mark.parametrize("scale", [1.0, 4.0, 30.0])
def test_every_variant_matches_the_slow_reference(beta: float, teacher_k: int, student_k: int, scale: float) -> None:
    rng = np.random.default_rng(teacher_k * 31 + student_k)
    t, s = correlated(rng, 40, 90, scale)
    for make in (lambda x: x, lambda x: ragged(rng, x)):
        teacher, student = make(topk_of(t, teacher_k, tail=False)), make(topk_of(s, student_k, tail=False))
        pairs = [(as_dict(teacher, r), as_dict(student, r)) for r in range(40)]
        alive = teacher.signal & student.signal

        union = topk_gjs(teacher, student, beta)
        np.testing.assert_array_equal(np.isnan(union), ~alive)
        lower = topk_gjs(teacher, student, beta, "intersection_tail")
        floor = topk_gjs(teacher, student, beta, "floor", -12.0)
        for row in np.flatnonzero(alive):
            a, b = pairs[row]
            assert union[row] == pytest.approx(reference.union_tail(a, b, beta), rel=2e-6, abs=2e-6)
            assert lower[row] == pytest.approx(reference.intersection_tail(a, b, beta), rel=1e-9, abs=1e-12)
            assert floor[row] == pytest.approx(reference.floor_renormalised(a, b, beta, -12.0), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("k", [1, 20, 64, 128, 200])
@pytest.mark.parametrize("beta", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_the_fast_kernel_stays_within_2e_6_of_float64(k: int, beta: float) -> None:
    rng = np.random.default_rng(k)
    for scale in (1.0, 3.0, 15.0):
        t, s = correlated(rng, 150, 600, scale)
        teacher, student = ragged(rng, topk_of(t, k)), topk_of(s, k, tail=False)
        values, left = UnionTail(teacher, student, beta, -20.0)()
        done = np.setdiff1d(np.flatnonzero(teacher.signal & student.signal), left)
        assert done.size > 10
        truth = [reference.union_tail(as_dict(teacher, row), as_dict(student, row), beta) for row in done[:60]]
        np.testing.assert_allclose(values[done[:60]], truth, rtol=0, atol=2e-6)  # 1.4e-6 on some CPUs


def test_a_list_of_ids_too_improbable_for_float32_is_a_signal() -> None:
    """Their mass rounds to 0, as that of an empty list does; a row of zeros and an empty row stay NaN."""
    lists = [[(3, -120.0), (4, -300.0)], [(3, -120.0)], [(3, -math.inf)], [], [(3, -0.5)]]
    teacher, student = TopK.from_lists(lists), TopK.from_lists([[(3, -0.7), (5, -1.0)]] * 5)
    for first, second in ((teacher, student), (student, teacher)):
        truth = [reference.union_tail(as_dict(first, r), as_dict(second, r), 0.5) for r in (0, 1, 4)]
        values = topk_gjs(first, second, 0.5)
        np.testing.assert_allclose(values[[0, 1, 4]], truth, rtol=0, atol=1e-6)
        assert np.isnan(values[[2, 3]]).all()


def test_a_share_below_the_smallest_double_is_no_exact_zero() -> None:
    """A missing id gets the smallest listed probability: exp(-800) is 0.0, and a KL against that would be infinite."""
    teacher = TopK.from_lists([[(1, -9.0), (2, -800.0)]])
    student = TopK.from_lists([[(3, math.log(0.5)), (2, -1.0)]])
    p = math.exp(-1.0)
    rest = p * (-1.0 + 800.0) + 0.5 * (math.log(0.5) + 800.0)  # of the ids; the missing one and the tail bin follow
    left = 0.5 - p
    tail = (left - math.exp(-20.0)) * (math.log(left - math.exp(-20.0)) - math.log1p(-math.exp(-9.0)))
    missing = math.exp(-20.0) * (-20.0 + 9.0)
    assert topk_gjs(teacher, student, 1.0)[0] == pytest.approx(rest + missing + tail, rel=1e-6)


def test_flat_lists_of_thousands_stay_within_1e_5_of_float64() -> None:
    """Nearly all the mass in many small numbers is where float32 rounds most."""
    rng = np.random.default_rng(4)
    t, s = (np.log(rng.dirichlet(np.full(3000, 50.0), size=4) * (1 - 1e-5)) for _ in range(2))
    teacher, student = topk_of(t, 3000, tail=False), topk_of(s, 3000, tail=False)
    apart = TopK(0, student.ids + 3000, student.logp, student.actual_ids, student.actual_logp, student.tail_logp)
    for other in (student, apart):
        for beta in (0.5, 0.99):
            truth = [reference.union_tail(as_dict(teacher, r), as_dict(other, r), beta) for r in range(4)]
            np.testing.assert_allclose(topk_gjs(teacher, other, beta), truth, rtol=0, atol=1e-5)


def test_blocks_do_not_leak_into_one_another() -> None:
    rng = np.random.default_rng(9)
    t, s = correlated(rng, 5000, 40, 2.0)
    teacher, student = topk_of(t, 20), topk_of(s, 20)
    whole = topk_gjs(teacher, student, 0.5)
    edge = BLOCK_SLOTS // 40
    for start in (0, edge - 1, edge, edge + 1, 4990):
        part = slice(start, start + 7)
        np.testing.assert_allclose(topk_gjs(teacher.slice(part), student.slice(part), 0.5), whole[part], atol=3e-7)


def test_calls_with_other_lists_and_in_other_threads_share_no_buffers() -> None:
    """Buffers are kept from call to call; the same number of slots can be divided otherwise."""
    rng = np.random.default_rng(10)
    t, s = correlated(rng, 400, 60, 2.0)
    for row, kept in ((7, 10), (11, 5)):  # zeros after them: it matters which slot is the last of which list
        t[row] = np.where(np.arange(60) < kept, np.log(0.9 / kept), -np.inf)
    pairs = [(topk_of(t, k), topk_of(s, other)) for k, other in ((20, 20), (8, 32), (32, 8), (20, 20), (5, 5))]
    alone = [_exact(*pair, 0.4, "union_tail", -20.0) for pair in pairs]
    assert len({float(values[3]) for values in alone}) == 4

    def repeated(which: int) -> list[np.ndarray]:
        return [topk_gjs(*pairs[which], 0.4) for _ in range(15)]

    for which in range(5):
        np.testing.assert_allclose(topk_gjs(*pairs[which], 0.4), alone[which], atol=1e-6)
    with ThreadPoolExecutor(5) as pool:
        for which, results in enumerate(pool.map(repeated, range(5))):
            for values in results:
                np.testing.assert_allclose(values, alone[which], atol=1e-6)


@pytest.mark.parametrize("k", [2, 20, 64])
def test_the_largest_id_that_fits_into_a_key_and_the_next_are_both_right(k: int) -> None:
    rng = np.random.default_rng(k)
    t, s = correlated(rng, 8, 2 * k, 2.0)
    teacher, student = topk_of(t, k), topk_of(s, k)
    common = topk_gjs(teacher, student, 0.5)
    largest, limit = max(teacher.ids.max(), student.ids.max()), UnionTail(teacher, student, 0.5, -20.0).max_id
    for top, redone in ((limit, False), (limit + 1, True), (2 * limit, True)):
        shifted = [
            replace(side, ids=np.where(side.ids < k, side.ids, side.ids + (top - largest)).astype(np.int32))
            for side in (teacher, student)
        ]
        assert max(side.ids.max() for side in shifted) == top
        assert bool(UnionTail(*shifted, 0.5, -20.0)()[1].size) == redone
        np.testing.assert_allclose(topk_gjs(*shifted, 0.5), common, atol=1e-6)


def test_neighbouring_rows_that_share_ids_are_not_pairs() -> None:
    """The last key of one row and the first of the next are the same id: a flat comparison would pair them."""
    ids = np.array([[5, 9], [9, 11]], dtype=np.int32)
    logp = np.log(np.array([[0.5, 0.3], [0.6, 0.2]], dtype=np.float32))
    teacher = TopK(0, ids, logp, np.full(2, -1), np.full(2, np.nan), np.full(2, np.nan))
    student = TopK(0, ids - 4, logp, np.full(2, -1), np.full(2, np.nan), np.full(2, np.nan))
    expected = [reference.union_tail(as_dict(teacher, r), as_dict(student, r), 0.5) for r in range(2)]
    np.testing.assert_allclose(topk_gjs(teacher, student, 0.5), expected, atol=1e-6)


def test_ids_too_large_for_a_short_key_are_still_right() -> None:
    big = 2**31 - 5
    teacher = TopK.from_lists([[(big, -0.3), (7, -2.0)]])
    student = TopK.from_lists([[(7, -0.4), (big, -1.6)]])
    expected = reference.union_tail(as_dict(teacher, 0), as_dict(student, 0), 0.5)
    assert topk_gjs(teacher, student, 0.5)[0] == pytest.approx(expected, abs=1e-9)


def test_one_uncommon_row_a_block_leaves_the_other_rows_and_blocks_as_they_are() -> None:
    """A row below the floor, one with holes and one with a huge id stand in blocks of their own."""
    rng = np.random.default_rng(12)
    t, s = correlated(rng, 300, 60, 2.0)
    teacher, student = topk_of(t, 20), topk_of(s, 20)
    common = topk_gjs(teacher, student, 0.3)
    block = BLOCK_SLOTS // 40
    many = np.arange(3 * block) % 300
    low, hole, huge = 7, block + 11, 2 * block + 5
    ids, logp = teacher.ids[many].copy(), teacher.logp[many].copy()
    logp[low] = np.where(np.arange(20) < 2, logp[low] - 1.0, -30.0 - np.arange(20))
    ids[hole, 15:], logp[hole, 13:] = -1, -np.inf
    ids[huge, 0] = 2**31 - 1
    unknown = np.full(many.size, np.nan, dtype=np.float32)
    changed = TopK(0, ids, logp, np.full(many.size, -1), unknown, unknown)
    plenty = TopK(0, student.ids[many], student.logp[many], np.full(many.size, -1), unknown, unknown)
    values, left = UnionTail(changed, plenty, 0.3, -20.0)()
    assert set(left) >= set(range(huge - 5, 3 * block))  # the whole third block
    assert np.isnan(values[left]).all()
    whole = topk_gjs(changed, plenty, 0.3)
    for row in (low, hole, huge):
        truth = reference.union_tail(as_dict(changed, row), as_dict(plenty, row), 0.3)
        assert whole[row] == pytest.approx(truth, abs=1e-6)
        assert abs(whole[row] - common[many[row]]) > 1e-4
    others = np.setdiff1d(np.arange(many.size), [low, hole, huge])
    np.testing.assert_allclose(whole[others], common[many[others]], atol=2e-6)


@pytest.mark.parametrize("floor", [-15.0, -14.9, -5.0])
def test_near_certain_lists_stay_within_1e_6_of_float64_at_every_floor(floor: float) -> None:
    """A listed probability and a missing id's share together pass 1 here."""
    teacher = TopK.from_lists([[(3, -3e-7), (5, -17.0)], [(3, -3e-7), (4, -15.5)], [(3, -0.7), (4, -0.7)]])
    student = TopK.from_lists([[(3, -2e-7), (5, -16.5)], [(3, -2e-7), (5, -15.9)], [(3, -1e-7), (9, -16.5)]])
    for beta in (0.05, 0.5, 0.95):
        truth = [reference.union_tail(as_dict(teacher, r), as_dict(student, r), beta, floor) for r in range(3)]
        np.testing.assert_allclose(topk_gjs(teacher, student, beta, floor=floor), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_full_lists_give_the_dense_value_in_every_variant(beta: float) -> None:
    rng = np.random.default_rng(4)
    t, s = random_logp(rng, 6, 25), random_logp(rng, 6, 25)
    teacher, student = topk_of(t, 25), topk_of(s, 25)
    dense = gjs(t, s, beta)
    for missing in ("union_tail", "intersection_tail", "floor", "renormalise"):
        np.testing.assert_allclose(topk_gjs(teacher, student, beta, missing), dense, atol=3e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_intersection_is_a_lower_bound_of_the_dense_value(beta: float) -> None:
    rng = np.random.default_rng(6)
    t, s = correlated(rng, 200, 60, 2.0)
    dense = gjs(t, s, beta)
    for k in (1, 5, 20, 59):
        lower = topk_gjs(topk_of(t, k), topk_of(s, k), beta, "intersection_tail")
        assert (lower <= dense + 2e-6).all()
        assert lower.max() > 0


def test_renormalise_looks_at_common_ids_only_and_has_no_signal_without_one() -> None:
    teacher = TopK.from_lists([[(1, np.log(0.6)), (2, np.log(0.2)), (3, np.log(0.1))], [(1, -0.5)]])
    student = TopK.from_lists([[(2, np.log(0.4)), (1, np.log(0.1)), (9, np.log(0.1))], [(2, -0.5)]])
    got = topk_gjs(teacher, student, 0.5, "renormalise")
    assert got[0] == pytest.approx(reference.gjs(np.log([0.75, 0.25]), np.log([0.2, 0.8]), 0.5), abs=1e-6)
    assert np.isnan(got[1])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_stored_tail_wins_over_one_minus_the_rounded_mass(beta: float) -> None:
    """Rounding took 0.02 from this teacher's list: 1 - mass says 0.12, the stored tail says 0.1."""
    nothing = (np.full(1, -1), np.full(1, np.nan))
    teacher = TopK(0, np.array([[1, 2]]), np.log(np.array([[0.6, 0.28]])), *nothing, np.log(np.array([0.1])))
    student = TopK(0, np.array([[2, 3]]), np.log(np.array([[0.5, 0.3]])), *nothing, np.log(np.array([0.2])))
    share = math.exp(-20)
    for first, second, weight in ((teacher, student, beta), (student, teacher, 1 - beta)):
        union = reference.gjs_of([0.6, 0.28, share, 0.1 - share], [share, 0.5, 0.3, 0.2 - share], beta)
        assert topk_gjs(first, second, weight)[0] == pytest.approx(union, abs=2e-6)
        lower = reference.gjs_of([0.28, 0.1 + 0.6], [0.5, 0.2 + 0.3], beta)
        assert topk_gjs(first, second, weight, "intersection_tail")[0] == pytest.approx(lower, abs=1e-6)


def test_wrong_arguments_are_refused() -> None:
    one, two = TopK.from_lists([[(1, -0.5)]]), TopK.from_lists([[(1, -0.5)], [(2, -0.5)]])
    with pytest.raises(ConfigError, match="rows"):
        topk_gjs(one, two, 0.5)
    with pytest.raises(ConfigError, match="variant"):
        topk_gjs(one, one, 0.5, "tail")
    with pytest.raises(ConfigError, match="floor"):
        topk_gjs(one, one, 0.5, floor=0.0)
    with pytest.raises(ConfigError, match="beta"):
        topk_gjs(one, one, -0.5)
    left = TopK.from_lists([[(1, -0.5)]], actual_ids=[1])
    right = TopK.from_lists([[(1, -0.5)]], actual_ids=[2])
    with pytest.raises(AlignmentError, match="different completions"):
        topk_gjs(left, right, 0.5)


@pytest.mark.parametrize("missing", ["union_tail", "intersection_tail", "floor", "renormalise"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_rows_and_no_lists_are_handled(missing: str, beta: float) -> None:
    empty = TopK.from_lists([])
    assert topk_gjs(empty, empty, beta, missing).shape == (0,)
    hole, some = TopK.from_lists([[], []]), TopK.from_lists([[(1, -0.5)], None])
    assert np.isnan(topk_gjs(hole, some, beta, missing)).all()
    assert np.isnan(topk_gjs(some, hole, beta, missing)).all()


@pytest.mark.parametrize("missing", [2, 49, 60, 90])
def test_missing_ids_that_take_all_that_is_left_leave_a_tail_of_exactly_nothing(missing: int) -> None:
    """1e-7 shared by 49 ids is less than exp(-20): the rest is 0, not the rounding of a difference."""
    teacher = TopK.from_lists([[(0, 0.0)]])
    student = TopK.from_lists([[(token, -math.log(2.0 + missing)) for token in range(missing + 1)]])
    value = [float(topk_gjs(teacher, student, beta)[0]) for beta in (0.0, 1.0, 0.5)]
    assert math.isfinite(value[0])
    assert math.isinf(value[1]) == (missing >= 49)
    assert 0.0 < value[2] < math.log(2)
