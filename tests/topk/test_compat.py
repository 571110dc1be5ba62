"""The source's list functions: its values where they are a divergence, the rulings where they are not."""

import math

import numpy as np
import pytest

from tests.topk.lists import golden_json, number, positions
from topkd.topk import compute_topk_gjs, extract_token_logprobs, slice_completion_topk
from topkd.topk.errors import AlignmentError, ConfigError, ResponseError

GOLDEN = golden_json("claas_gjs.json")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_compute_topk_gjs_reproduces_the_source_where_it_is_a_divergence(case: dict) -> None:
    if "claas_wrong" in case["tags"] and case["name"] != "single_token_same":
        pytest.skip("the source's value must not be reproduced; the tests below hold the ruling")
    got = compute_topk_gjs(
        positions(case["teacher_topk"]), positions(case["student_topk"]), case["alpha"], case["floor"]
    )
    np.testing.assert_allclose(got, [number(x) for x in case["claas"]], rtol=1e-12, atol=1e-14)


def test_the_ends_are_the_two_kls_and_not_what_the_source_returned() -> None:
    cases = {case["name"]: case for case in GOLDEN["cases"]}
    for name in ("alpha_one", "alpha_zero"):
        case = cases[name]
        got = compute_topk_gjs(positions(case["teacher_topk"]), positions(case["student_topk"]), case["alpha"])
        assert got == pytest.approx(case["ruling"]["union_floor_renorm"], rel=1e-12)
        assert got != pytest.approx(case["claas"], abs=1e-2)


def test_a_repeated_id_counts_once_with_its_larger_logprob() -> None:
    case = next(case for case in GOLDEN["cases"] if case["name"] == "duplicate_id_student_last_wins")
    teacher, student = positions(case["teacher_topk"]), positions(case["student_topk"])
    expected = pytest.approx(case["ruling"]["union_floor_renorm"], rel=1e-12)
    assert compute_topk_gjs(teacher, student, case["alpha"]) == expected
    assert compute_topk_gjs(teacher, [position[::-1] for position in student], case["alpha"]) == expected


def test_an_empty_list_is_no_signal() -> None:
    some = [(1, -0.5)]
    got = compute_topk_gjs([some, [], some, some], [[], some, [(2, math.nan)], some], 0.5)
    assert [math.isnan(x) for x in got] == [True, True, True, False]
    assert compute_topk_gjs([], [], 0.5) == []


def test_lists_of_different_length_and_wrong_arguments_are_refused() -> None:
    with pytest.raises(AlignmentError, match="length"):
        compute_topk_gjs([[(1, -0.5)]], [], 0.5)
    with pytest.raises(ConfigError, match="alpha"):
        compute_topk_gjs([[(1, -0.5)]], [[(1, -0.5)]], 1.5)
    with pytest.raises(ConfigError, match="floor"):
        compute_topk_gjs([[(1, -0.5)]], [[(1, -0.5)]], 0.5, 1.0)
    for token in (-1, 2**31, 2**70):
        with pytest.raises(ResponseError, match="teacher_topk: token id out of range"):
            compute_topk_gjs([[(token, -0.5)]], [[(1, -0.5)]], 0.5)


@pytest.mark.parametrize("case", GOLDEN["extract"])
def test_extract_token_logprobs_reads_lists_as_the_source_does(case: dict) -> None:
    if case["claas"] == "ValueError":
        with pytest.raises(ValueError, match="length"):
            extract_token_logprobs(positions(case["topk"]), case["ids"])
        return
    assert extract_token_logprobs(positions(case["topk"]), case["ids"]) == case["claas"]


def test_without_a_floor_an_unlisted_token_is_unknown() -> None:
    got = extract_token_logprobs([[(1, -0.5)], [(2, -0.7)], []], [9, 2, 3], floor_logprob=None)
    np.testing.assert_array_equal(got, [math.nan, -0.7, math.nan])


@pytest.mark.parametrize("case", GOLDEN["slices"])
def test_slice_completion_topk_starts_at_the_prompt_length(case: dict) -> None:
    got = slice_completion_topk(case["full"], case["prompt_len"], case["completion_len"])
    assert got == case["claas"]


def test_a_negative_slice_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        slice_completion_topk([None, [(1, -1.0)]], -1, 1)
