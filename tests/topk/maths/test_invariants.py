"""The invariants I1 .. I26 of the maths, on the NumPy side, over random distributions.

The torch side, and I23 .. I26, stand in test_invariants_torch and test_invariants_torch_rules.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.topk import reference
from tests.topk.lists import log_softmax, topk_of
from topkd.topk import (
    TopK,
    compute_topk_gjs,
    gjs,
    gjs_advantage,
    shared_support_gjs,
    topk_gjs,
    topk_weights,
)

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
EPS = 1e-9
MISSING = ("union_tail", "intersection_tail", "floor", "renormalise")

betas = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
interior = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])


@st.composite
def pairs(draw: st.DrawFn, *, smallest: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Teacher and student logprobs of one position: flat, peaked, alike or unrelated."""
    vocab = draw(st.integers(smallest, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.01, 1.0, 3.0, 8.0]))
    near = draw(st.sampled_from([0.0, 0.5, 0.999]))
    base = rng.normal(size=vocab)
    other = near * base + math.sqrt(1 - near**2) * rng.normal(size=vocab)
    return log_softmax(scale * base), log_softmax(scale * other)


def lists(pair: tuple[np.ndarray, np.ndarray], k: int) -> tuple[TopK, TopK]:
    return topk_of(pair[0][None], k), topk_of(pair[1][None], k)


@EXAMPLES
@given(pairs(), betas, st.integers(1, 24))
def test_i01_no_divergence_is_negative(pair: tuple, beta: float, k: int) -> None:
    teacher, student = pair
    assert gjs(teacher, student, beta) >= 0
    for tail in ("bucket", "renormalise"):
        assert shared_support_gjs(teacher[:k], student[:k], beta, tail) >= 0
    for missing in MISSING:
        value = topk_gjs(*lists(pair, k), beta, missing)[0]
        assert value >= 0 or math.isnan(value)


@EXAMPLES
@given(pairs(), betas)
def test_i02_zero_if_and_only_if_identical(pair: tuple, beta: float) -> None:
    teacher, student = pair
    assert gjs(teacher, teacher, beta) == pytest.approx(0.0, abs=1e-12)
    distance = np.abs(np.exp(teacher) - np.exp(student)).sum()
    if distance > 1e-3:
        assert gjs(teacher, student, beta) > 1e-10
    for missing in MISSING:
        assert topk_gjs(*lists((teacher, teacher), 5), beta, missing)[0] == pytest.approx(0.0, abs=1e-6)


@EXAMPLES
@given(pairs(), interior, st.integers(1, 24))
def test_i03_bounded_by_the_entropy_of_the_mixture_weight(pair: tuple, beta: float, k: int) -> None:
    bound = reference.binary_entropy(beta)
    assert bound <= math.log(2) + EPS
    assert gjs(*pair, beta) <= bound + EPS
    assert shared_support_gjs(pair[0][:k], pair[1][:k], beta) <= bound + EPS
    for missing in MISSING:
        assert not topk_gjs(*lists(pair, k), beta, missing)[0] > bound + 1e-6


@EXAMPLES
@given(pairs(), betas, st.integers(1, 24))
def test_i04_swapping_the_sides_swaps_the_weight(pair: tuple, beta: float, k: int) -> None:
    teacher, student = pair
    assert gjs(teacher, student, beta) == pytest.approx(float(gjs(student, teacher, 1 - beta)), rel=1e-9, abs=EPS)
    t, s = lists(pair, k)
    for missing in MISSING:
        np.testing.assert_allclose(
            topk_gjs(t, s, beta, missing), topk_gjs(s, t, 1 - beta, missing), rtol=1e-6, atol=2e-6
        )


@EXAMPLES
@given(pairs(), betas, st.randoms(use_true_random=False))
def test_i05_order_does_not_matter(pair: tuple, beta: float, random: object) -> None:
    order = list(range(len(pair[0])))
    random.shuffle(order)
    teacher, student = (side[order] for side in pair)
    assert gjs(teacher, student, beta) == pytest.approx(float(gjs(*pair, beta)), rel=1e-10, abs=1e-13)
    plain = [list(enumerate(side.tolist()))[:6] for side in pair]
    renamed = [[(1000 - token, value) for token, value in reversed(side)] for side in plain]
    for missing in MISSING:
        one = topk_gjs(*(TopK.from_lists([side]) for side in plain), beta, missing)
        two = topk_gjs(*(TopK.from_lists([side]) for side in renamed), beta, missing)
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


@EXAMPLES
@given(pairs(smallest=4), betas)
def test_i06_i07_the_tail_bucket_rises_with_k_to_the_dense_value(pair: tuple, beta: float) -> None:
    order = np.argsort(-pair[0])
    teacher, student = pair[0][order], pair[1][order]
    dense = float(gjs(teacher, student, beta))
    values = [
        float(shared_support_gjs(teacher[:k], student[:k], beta))
        for k in range(1, len(order))
        if min(1 - np.exp(teacher[:k]).sum(), 1 - np.exp(student[:k]).sum()) > 1e-6
    ]
    assert all(later >= earlier - EPS for earlier, later in pairwise(values))
    assert all(value <= dense + EPS for value in values)


@EXAMPLES
@given(pairs(smallest=3), interior, st.integers(1, 23))
def test_i08_the_partial_sum_lies_between_zero_and_the_tail_bucket(pair: tuple, beta: float, k: int) -> None:
    teacher, student = pair[0][:k], pair[1][:k]
    partial = float(shared_support_gjs(teacher, student, beta, "partial"))
    assert -EPS <= partial <= float(shared_support_gjs(teacher, student, beta)) + EPS


@EXAMPLES
@given(pairs(), betas, st.integers(1, 6))
def test_i09_a_repeated_id_changes_nothing(pair: tuple, beta: float, k: int) -> None:
    plain = [list(enumerate(side.tolist()))[:k] for side in pair]
    repeated = [[*side, side[0], (side[-1][0], side[-1][1] - 1.0)] for side in plain]
    for missing in MISSING:
        np.testing.assert_array_equal(
            topk_gjs(*(TopK.from_lists([side]) for side in plain), beta, missing),
            topk_gjs(*(TopK.from_lists([side]) for side in repeated), beta, missing),
        )
    assert compute_topk_gjs(plain[:1], plain[1:], beta) == compute_topk_gjs(repeated[:1], repeated[1:], beta)


@EXAMPLES
@given(pairs(), betas)
def test_i10_i11_the_policy_gradient_is_the_gradient_and_sums_to_zero(pair: tuple, beta: float) -> None:
    teacher, student = pair
    s = np.exp(student)
    score = np.eye(len(s)) - s
    got = (s * gjs_advantage(teacher, student, beta)) @ score
    scale = 1 + np.abs(got).max()
    np.testing.assert_allclose(
        got / scale, -np.array(reference.gjs_gradient(np.exp(teacher), s, beta)) / scale, atol=EPS
    )
    assert got.sum() / scale == pytest.approx(0.0, abs=EPS)
    as_advantage = (s * float(gjs(teacher, student, beta))) @ score
    np.testing.assert_allclose(as_advantage / scale, 0.0, atol=EPS)


@EXAMPLES
@given(pairs(), interior)
def test_i10_finite_differences_of_the_dense_value_agree(pair: tuple, beta: float) -> None:
    teacher, student = pair
    s = np.exp(student)
    exact = np.array(reference.gjs_gradient(np.exp(teacher), s, beta))
    step = 1e-5
    for v in (0, len(s) - 1):
        unit = np.eye(len(s))[v] * step
        numeric = (
            float(gjs(teacher, log_softmax(student + unit), beta))
            - float(gjs(teacher, log_softmax(student - unit), beta))
        ) / (2 * step)
        assert numeric == pytest.approx(exact[v], abs=1e-7)


@EXAMPLES
@given(st.floats(-60, 0), st.floats(-60, 0), betas)
def test_i12_i13_i14_the_advantage_is_bounded_below_zero_at_equality_and_signed(
    teacher: float, student: float, beta: float
) -> None:
    value = float(gjs_advantage([teacher], [student], beta)[0])
    if beta < 1:
        assert value >= ((1 - beta) * math.log1p(-beta) if beta > 0 else -1.0) - EPS
    assert gjs_advantage([student], [student], beta)[0] == 0.0
    if abs(teacher - student) > 1e-9:
        assert math.copysign(1, value) == math.copysign(1, teacher - student)


@EXAMPLES
@given(pairs(), interior)
def test_i15_disjoint_lists_of_full_mass_reach_the_bound(pair: tuple, beta: float) -> None:
    count = len(pair[0])
    plain = [
        [(token + shift, value) for token, value in enumerate(side.tolist())]
        for shift, side in zip((0, count), pair, strict=True)
    ]
    got = topk_gjs(*(TopK.from_lists([side]) for side in plain), beta)[0]
    assert got == pytest.approx(reference.binary_entropy(beta), abs=5e-6)
    full = np.full(count, -np.inf)
    dense = gjs(np.concatenate([pair[0], full]), np.concatenate([full, pair[1]]), beta)
    assert float(dense) == pytest.approx(reference.binary_entropy(beta), abs=EPS)


@EXAMPLES
@given(pairs(), interior)
def test_i16_the_whole_vocabulary_is_the_dense_value(pair: tuple, beta: float) -> None:
    dense = float(gjs(*pair, beta))
    assert float(shared_support_gjs(*pair, beta)) == pytest.approx(dense, abs=1e-6)
    assert float(shared_support_gjs(*pair, beta, "renormalise")) == pytest.approx(dense, abs=1e-12)
    for missing in MISSING:
        assert topk_gjs(*lists(pair, len(pair[0])), beta, missing)[0] == pytest.approx(dense, abs=3e-6)


@EXAMPLES
@given(pairs(), betas, st.integers(1, 24))
def test_i17_no_signal_is_nan_whatever_the_other_side_says(pair: tuple, beta: float, k: int) -> None:
    scores, hole = topk_of(pair[0][None], k), TopK.from_lists([None])
    for missing in MISSING:
        assert math.isnan(topk_gjs(scores, hole, beta, missing)[0])
        assert math.isnan(topk_gjs(hole, scores, beta, missing)[0])
    weights, tail = topk_weights(
        TopK.concat([hole, scores]), np.full((2, scores.k), -math.log(30)), np.full(2, -1.0), beta=beta, lam=0.0
    )
    assert np.isnan(weights[0]).all()
    assert math.isnan(tail[0])
    assert not np.isnan(tail[1])


@EXAMPLES
@given(pairs(), betas, st.floats(-50, 50), st.sampled_from([0.5, 1.0, 2.0, 7.0]))
def test_i18_logit_shifts_change_nothing_and_temperature_is_a_power(
    pair: tuple, beta: float, shift: float, tau: float
) -> None:
    teacher, student = pair
    shifted = float(gjs(log_softmax(teacher + shift), log_softmax(student + shift), beta))
    assert shifted == pytest.approx(float(gjs(teacher, student, beta)), rel=1e-8, abs=1e-11)
    powers = [np.exp(side) ** (1 / tau) for side in pair]
    tempered = float(gjs(*(log_softmax(side / tau) for side in pair), beta))
    assert tempered == pytest.approx(float(gjs(*(np.log(p / p.sum()) for p in powers), beta)), rel=1e-8, abs=1e-11)


@EXAMPLES
@given(pairs(), betas, st.integers(1, 12))
def test_i19_rows_do_not_touch_one_another(pair: tuple, beta: float, k: int) -> None:
    scores, other = lists(pair, k)
    hole = TopK.from_lists([None])
    alone = {missing: topk_gjs(scores, other, beta, missing)[0] for missing in MISSING}
    for missing, value in alone.items():
        for teacher, student, place in (
            (TopK.concat([hole, scores]), TopK.concat([other, other]), 1),
            (TopK.concat([scores, other, hole]), TopK.concat([other, scores, scores]), 0),
        ):
            got = topk_gjs(teacher, student, beta, missing)[place]
            np.testing.assert_allclose(got, value, atol=1e-6)


@EXAMPLES
@given(pairs(), betas)
def test_i20_a_ratio_of_one_is_on_policy(pair: tuple, beta: float) -> None:
    teacher = topk_of(pair[0][None], 1, actual=np.array([int(np.argmin(pair[0]))]))
    at = pair[1][teacher.ids]
    own = pair[1][teacher.actual_ids]
    plain = topk_weights(teacher, at, own, beta=beta, lam=1.0)
    ratio = topk_weights(teacher, at, own, beta=beta, lam=1.0, is_weight=np.ones(1))
    twice = topk_weights(teacher, at, own, beta=beta, lam=1.0, is_weight=np.array([2.0]))
    for a, b in zip(plain, ratio, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(twice[0], plain[0])
    np.testing.assert_allclose(twice[1], 2 * plain[1], rtol=1e-12)


@EXAMPLES
@given(pairs(), betas)
def test_i21_everything_is_alike_at_infinite_temperature(pair: tuple, beta: float) -> None:
    assert float(gjs(*(log_softmax(side / 1e6) for side in pair), beta)) < 1e-9


@EXAMPLES
@given(pairs(smallest=6), betas, st.integers(1, 4))
def test_i22_one_more_id_on_both_sides_never_lowers_the_tail_divergence(pair: tuple, beta: float, k: int) -> None:
    realised = len(pair[0]) - 1
    ids = [*range(k), realised]
    less = [side[ids[:-1]] for side in pair]
    more = [side[ids] for side in pair]
    if min(1 - np.exp(side).sum() for side in more) < 1e-6:
        return
    assert float(shared_support_gjs(*more, beta)) >= float(shared_support_gjs(*less, beta)) - EPS
    scores = TopK.from_lists(
        [[(token, float(pair[0][token])) for token in ids]], actual_ids=[realised], actual_logp=[pair[0][realised]]
    )
    assert scores.at(np.array([realised]))[0][0] == np.float32(pair[0][realised])
    wide = topk_gjs(
        *(TopK.from_lists([[(t, float(side[t])) for t in ids]]) for side in pair), beta, "intersection_tail"
    )
    slim = topk_gjs(
        *(TopK.from_lists([[(t, float(side[t])) for t in ids[:-1]]]) for side in pair), beta, "intersection_tail"
    )
    assert wide[0] >= slim[0] - 3e-6
