"""Arguments that cannot be right end in one ConfigError that names them, never in a number or a NumPy traceback."""

import math

import numpy as np
import pytest
import torch

from topkd.topk import (
    TopK,
    compute_topk_gjs,
    discounted_return,
    entropy_bounds,
    extract_token_logprobs,
    gated_rows,
    gjs,
    gjs_advantage,
    kl_k3,
    shared_support_gjs,
    slice_completion_topk,
    topk_gjs,
    topk_value_baseline,
    topk_weights,
    value_baseline,
)
from topkd.topk.errors import ConfigError

ONE = TopK.from_lists([[(1, -0.5), (2, -2.0)]], actual_ids=[3], actual_logp=[-3.0])
LOGP = np.log([[0.5, 0.25, 0.25]])
NOT_LOGPROBS = (
    None,
    "x",
    [[-1.0, -2.0], [-1.0]],
    torch.zeros(1, 3, dtype=torch.bfloat16),
    torch.zeros(1, 3, requires_grad=True),
    np.array([None, 1.0]),
    np.array([1j]),
    np.array([True]),
    [[(1, -0.5), ("a", -1.0)]],
)
NOT_NUMBERS = (None, "x", "0.5", True, [0.5], np.array([0.5, 0.5]), torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("value", NOT_LOGPROBS, ids=lambda value: type(value).__name__)
def test_what_is_not_an_array_of_logprobs_is_refused_by_name(value: object) -> None:
    for call in (gjs, gjs_advantage, shared_support_gjs, value_baseline):
        with pytest.raises(ConfigError, match="teacher_logp"):
            call(value, LOGP, 0.5)
        with pytest.raises(ConfigError, match="student_logp"):
            call(LOGP, value, 0.5)
    with pytest.raises(ConfigError, match="teacher_logp"):
        kl_k3(value, LOGP)
    with pytest.raises(ConfigError, match="student_logp_at_ids"):
        topk_weights(ONE, value, [-3.0], beta=0.5, lam=1.0)
    with pytest.raises(ConfigError, match="student_logp_at_ids"):
        gated_rows(ONE, value)
    with pytest.raises(ConfigError, match="divergence"):
        discounted_return(None, value, 0.5)


def test_what_a_masked_array_hides_is_unknown_and_not_a_number() -> None:
    hidden = np.ma.masked_array([-1.0, -2.0], mask=[False, True])
    np.testing.assert_array_equal(gjs_advantage(hidden, [-1.5, -1.5], 1.0), [0.5, math.nan])
    row = np.ma.masked_array(LOGP, mask=[[False, True, False]])
    assert math.isnan(gjs(row, LOGP, 0.5)[0])


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -0.1, 1.1, math.nan], ids=repr)
def test_a_weight_that_is_no_number_in_0_1_is_refused(value: object) -> None:
    for call in (
        lambda: gjs(LOGP, LOGP, value),
        lambda: gjs_advantage([-1.0], [-1.0], value),
        lambda: topk_gjs(ONE, ONE, value),
        lambda: topk_value_baseline(ONE, ONE, value),
        lambda: topk_weights(ONE, [[-1.0, -2.0]], [-3.0], beta=value, lam=1.0),
    ):
        with pytest.raises(ConfigError, match="beta"):
            call()
    with pytest.raises(ConfigError, match="lam"):
        topk_weights(ONE, [[-1.0, -2.0]], [-3.0], beta=0.5, lam=value)
    with pytest.raises(ConfigError, match="alpha"):
        compute_topk_gjs([[(1, -0.5)]], [[(1, -0.5)]], value)
    with pytest.raises(ConfigError, match="gamma"):
        discounted_return([1.0], [1.0], value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, 1.0, math.nan], ids=repr)
def test_a_floor_that_is_no_negative_number_is_refused(value: object) -> None:
    for call in (
        lambda: topk_gjs(ONE, ONE, 0.5, floor=value),
        lambda: topk_value_baseline(ONE, ONE, 0.5, floor=value),
        lambda: compute_topk_gjs([[(1, -0.5)]], [[(1, -0.5)]], 0.5, value),
    ):
        with pytest.raises(ConfigError, match="floor"):
            call()
    if value is not None:  # None asks for NaN there
        with pytest.raises(ConfigError, match="floor_logprob"):
            extract_token_logprobs([[(1, -0.5)]], [2], value)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("floor", [-1e5, -math.inf])
def test_a_floor_below_every_float_leaves_a_missing_id_no_probability(beta: float, floor: float) -> None:
    teacher, student = TopK.from_lists([[(1, -0.5)]]), TopK.from_lists([[(1, -0.7), (2, -1.0)]])
    for one, two in ((teacher, student), (student, teacher)):
        value = float(topk_gjs(one, two, beta, floor=floor)[0])
        infinite = (beta == 0.0 and one is student) or (beta == 1.0 and two is student)
        assert math.isinf(value) if infinite else 0.0 < value < 3.0
    ragged = TopK.from_lists([[(1, -0.5)], [(1, -0.5), (3, -1.5)]])
    both = topk_gjs(ragged, TopK.concat([student, student]), beta, floor=floor)
    alone = [float(topk_gjs(ragged.slice(slice(row, row + 1)), student, beta, floor=floor)[0]) for row in range(2)]
    np.testing.assert_array_equal(both, alone)
    assert not np.isnan(both).any()


@pytest.mark.parametrize("value", [None, [[(1, -0.5)]], {1: -0.5}, LOGP], ids=lambda value: type(value).__name__)
def test_lists_where_a_topk_belongs_are_refused_with_the_way_to_build_one(value: object) -> None:
    for call in (
        lambda: topk_gjs(value, ONE, 0.5),
        lambda: topk_gjs(ONE, value, 0.5, "floor"),
        lambda: topk_value_baseline(value, ONE, 0.5),
        lambda: entropy_bounds(value, 9),
        lambda: topk_weights(value, [[-1.0, -2.0]], [-3.0], beta=0.5, lam=1.0),
        lambda: gated_rows(value, [[-1.0, -2.0]]),
    ):
        with pytest.raises(ConfigError, match="from_lists"):
            call()


def test_counts_that_are_no_integers_are_refused() -> None:
    for size in (None, "x", 9.0, True):
        with pytest.raises(ConfigError, match="vocab_size must be an integer"):
            entropy_bounds(ONE, size)
        with pytest.raises(ConfigError, match="prompt_len must be an integer"):
            slice_completion_topk([None], size, 0)
        with pytest.raises(ConfigError, match="start must be an integer"):
            TopK.from_lists([[(1, -0.5)]], start=size)
    with pytest.raises(ConfigError, match="k must be an integer"):
        ONE.slice(k=1.5)
    with pytest.raises(ConfigError, match="lengths"):
        discounted_return([1.0, 1.0], [1.0, 1.0], 0.5, lengths=[1.5, 0.5])


@pytest.mark.parametrize("ratio", [-1.0, math.inf, [-0.1]])
def test_an_importance_ratio_that_is_none_is_refused(ratio: object) -> None:
    with pytest.raises(ConfigError, match="not an importance ratio"):
        topk_weights(ONE, [[-1.0, -2.0]], [-3.0], beta=0.5, lam=1.0, is_weight=ratio)


@pytest.mark.parametrize(
    "lists",
    [
        None,
        5,
        "ab",
        np.log([[[0.5, 0.2]]]),
        [[(1, 1j)]],
        [[(1, "-0.5")]],
        [(1, -0.5)],
        [[(1,)]],
        [[(1, -0.5, 3)]],
        [[("a", -0.5)]],
        [[(1.5, -0.5)]],
        [{1: -0.5}],
        [[5]],
    ],
    ids=repr,
)
def test_malformed_lists_are_refused_and_an_id_is_never_rounded(lists: object) -> None:
    with pytest.raises(ConfigError):
        TopK.from_lists(lists)
    with pytest.raises(ConfigError):
        compute_topk_gjs(lists, [[(1, -0.5)]], 0.5)
    with pytest.raises(ConfigError):
        extract_token_logprobs(lists, [1])


def test_a_null_position_is_a_hole_in_the_compatible_functions_too() -> None:
    values = compute_topk_gjs([None, [(1, -0.5)]], [[(1, -0.5)], [(1, -0.5)]], 0.5)
    assert math.isnan(values[0])
    assert values[1] == 0.0
    assert math.isnan(extract_token_logprobs([None], [1], None)[0])
    for token in (None, "a", 1.5, [1]):
        with pytest.raises(ConfigError, match="token id"):
            extract_token_logprobs([[(1, -0.5)]], [token])
    for reply in (None, "abc", [5]):
        with pytest.raises(ConfigError, match="full"):
            slice_completion_topk(reply, 0, 1)
