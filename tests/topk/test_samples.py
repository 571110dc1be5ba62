"""Sampling parameters, rollouts, behaviours and prepared samples at their boundary."""

from dataclasses import replace

import numpy as np
import pytest

from topkd.topk import (
    Rollout,
    SampleCore,
    SamplingParams,
    ScalarBehavior,
    ScalarPreparedSample,
    TopK,
    TopKBehavior,
    TopKPreparedSample,
)
from topkd.topk.errors import AlignmentError, ConfigError


def rows(start: int, actual: list[int]) -> TopK:
    return TopK.from_lists(
        [[(1, -0.5)]] * len(actual), start=start, actual_ids=actual, actual_logp=[-1.0] * len(actual)
    )


def core(**change: object) -> SampleCore:
    fields = {"full_ids": [1, 2, 4, 9], "prompt_len": 2, "mask": [True, False], "teacher_prompt_ids": [8, 1, 2]}
    fields = {name: np.array(v) if isinstance(v, list) else v for name, v in {**fields, **change}.items()}
    return SampleCore(**fields)


BEHAVIOR = ScalarBehavior(np.array([-0.1, -0.2]))


def test_a_core_names_the_parts_of_its_sequence() -> None:
    one = core()
    assert one.completion_ids.tolist() == [4, 9]
    assert one.input_ids.tolist() == [1, 2, 4]
    assert one.target_ids.tolist() == [2, 4, 9]
    assert one.completion_len == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompt_len": 0}, AlignmentError, "prompt_len"),
        ({"prompt_len": 5}, AlignmentError, "prompt_len"),
        ({"mask": [True]}, AlignmentError, "mask"),
        ({"mask": [1, 0]}, ConfigError, "boolean"),
        ({"mask": [-100, 9]}, ConfigError, "boolean"),
        ({"teacher_prompt_ids": []}, AlignmentError, "teacher"),
        ({"full_ids": [1.0, 2.0, 4.0, 9.0]}, ConfigError, "integers"),
        ({"full_ids": [1, 2, 4, -1]}, ConfigError, "out of range"),
        ({"full_ids": [1, 2, 4, 2**33]}, ConfigError, "out of range"),
        ({"full_ids": [[1, 2, 4, 9]]}, ConfigError, "one-dimensional"),
    ],
)
def test_a_core_that_cannot_be_is_refused(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        core(**change)


def test_the_teacher_rows_stand_where_the_teachers_own_prompt_ends() -> None:
    sample = TopKPreparedSample(core(), BEHAVIOR, rows(2, [4, 9]))
    np.testing.assert_array_equal(sample.teacher_logp, np.float32([-1.0, -1.0]))
    assert sample.kind == "topk"
    for teacher, words in (
        (rows(1, [4, 9]), "not the prompt length"),
        (rows(2, [4, 8]), "another completion"),
        (rows(2, [4]), "rows"),
        (rows(2, [4, -1]), "lacks its realised token"),
    ):
        with pytest.raises(AlignmentError, match=words):
            TopKPreparedSample(core(), BEHAVIOR, teacher)


def test_a_behaviours_own_rows_stand_where_the_students_prompt_ends() -> None:
    good = TopKBehavior(np.array([-0.1, -0.2]), rows(1, [4, 9]))
    assert ScalarPreparedSample(core(), good, np.array([-1.0, np.nan])).kind == "scalar"
    for topk, words in ((rows(2, [4, 9]), "not the prompt length"), (rows(1, [4, 7]), "another completion")):
        with pytest.raises(AlignmentError, match=words):
            ScalarPreparedSample(core(), TopKBehavior(np.array([-0.1, -0.2]), topk), np.array([-1.0, -1.0]))
    with pytest.raises(AlignmentError, match="rows"):
        TopKBehavior(np.array([-0.1]), rows(1, [4, 9]))


def test_scalar_samples_need_one_logprob_a_token() -> None:
    with pytest.raises(AlignmentError, match="teacher_logp"):
        ScalarPreparedSample(core(), BEHAVIOR, np.array([-1.0]))
    with pytest.raises(AlignmentError, match="behavior"):
        ScalarPreparedSample(core(), ScalarBehavior(np.array([-1.0])), np.array([-1.0, -1.0]))
    with pytest.raises(ConfigError, match="above 0"):
        ScalarBehavior(np.array([0.9, 0.1]))


def test_a_rollout_is_checked_against_its_own_rows() -> None:
    def rollout(**change: object) -> Rollout:
        fields = {"prompt_ids": np.array([1, 2]), "completion_ids": np.array([4]), "logp": np.array([-0.5])}
        return Rollout(**{**fields, "finish_reason": "stop", "sampling": SamplingParams(), **change})

    assert rollout(topk=rows(1, [4])).topk is not None
    for change, words in (
        ({"prompt_ids": np.array([], dtype=np.int32)}, "prompt token"),
        ({"logp": np.array([-0.5, -0.5])}, "logp"),
        ({"topk": rows(0, [4])}, "not the prompt length"),
        ({"topk": rows(1, [5])}, "another completion"),
    ):
        with pytest.raises(AlignmentError, match=words):
            rollout(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_sampling_parameters_out_of_range_are_refused_by_name(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SamplingParams(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ],
)
def test_only_untouched_sampling_is_exact(change: dict) -> None:
    assert SamplingParams(max_tokens=7, stop_token_ids=(2,), seed=1).exact
    assert not replace(SamplingParams(), **change).exact
