"""``TopK``: what it accepts, what it refuses, and what it answers."""

import pickle

import numpy as np
import pytest

from tests.topk.lists import random_logp, topk_of
from topkd.topk import TopK
from topkd.topk.errors import ConfigError, ResponseError

FIELDS = {
    "start": 3,
    "ids": np.array([[4, 7], [5, -1]], dtype=np.int32),
    "logp": np.array([[-0.1, -3.0], [-0.5, -np.inf]], dtype=np.float32),
    "actual_ids": np.array([7, 9], dtype=np.int32),
    "actual_logp": np.array([-3.0, -6.0], dtype=np.float32),
    "tail_logp": np.array([-3.0, np.nan], dtype=np.float32),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logp": [[-0.1, np.nan], [-0.5, -np.inf]]}, ResponseError, "NaN"),
        ({"logp": [[0.5, -3.0], [-0.5, -np.inf]]}, ResponseError, "above 0"),
        ({"logp": [[-3.0, -0.1], [-0.5, -np.inf]]}, ResponseError, "descending"),
        ({"logp": [[-0.1, -0.2], [-0.5, -np.inf]]}, ResponseError, "mass above"),
        ({"logp": [[-0.1, -3.0], [-0.5, -4.0]]}, ResponseError, "pad"),
        ({"ids": [[4, 4], [5, -1]]}, ResponseError, "listed twice"),
        ({"ids": [[-1, 4], [5, -1]], "logp": [[-np.inf, -np.inf], [-0.5, -np.inf]]}, ResponseError, "before a listed"),
        ({"ids": [[-5, 4], [5, -1]]}, ResponseError, "out of range"),
        ({"ids": np.array([[2**40, 4], [5, -1]])}, ResponseError, "out of range"),
        ({"ids": [[4.0, 7.0], [5.0, -1.0]]}, ConfigError, "dtype"),
        ({"ids": [4, 7]}, ConfigError, r"\[R, K\]"),
        ({"actual_ids": [7]}, ConfigError, "actual_ids"),
        ({"actual_logp": [0.5, -1.0]}, ResponseError, "realised"),
        ({"tail_logp": [0.5, -1.0]}, ResponseError, "tail_logp"),
        ({"start": -1}, ConfigError, "start"),
    ],
)
def test_what_cannot_be_a_score_is_refused(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TopK(**{**FIELDS, **{name: v if name == "start" else np.asarray(v) for name, v in change.items()}})


def test_a_refusal_names_the_row_and_its_source_position() -> None:
    with pytest.raises(ResponseError, match="row 1 of 2, source position 4"):
        TopK(**{**FIELDS, "logp": np.array([[-0.1, -3.0], [0.7, -np.inf]])})


def test_arrays_are_read_only_and_the_callers_own_are_left_alone() -> None:
    mine = FIELDS["logp"].copy()
    scores = TopK(**{**FIELDS, "logp": mine})
    with pytest.raises(ValueError, match="read-only"):
        scores.logp[0, 0] = -9.0
    mine[0, 0] = -9.0
    assert scores.logp[0, 0] == np.float32(-0.1)


def test_at_answers_for_listed_ids_and_the_realised_token_and_for_nothing_else() -> None:
    scores = TopK(**FIELDS)
    logp, known = scores.at(np.array([[4, 7, 8, -1], [5, 9, 4, -1]]))
    np.testing.assert_array_equal(known, [[True, True, False, False], [True, True, False, False]])
    np.testing.assert_allclose(logp[0, :2], [-0.1, -3.0], rtol=1e-6)
    np.testing.assert_allclose(logp[1, :2], [-0.5, -6.0], rtol=1e-6)
    assert np.isnan(logp[~known]).all()
    single, _ = scores.at(np.array([9, 9]))
    np.testing.assert_array_equal(single, np.array([np.nan, -6.0], dtype=np.float32))
    assert TopK.from_lists([]).at([])[0].shape == (0,)


def test_the_exact_realised_logprob_wins_over_the_list() -> None:
    scores = TopK(**{**FIELDS, "actual_logp": np.array([-2.5, -6.0])})
    assert scores.at(np.array([7, 5]))[0][0] == np.float32(-2.5)


def test_an_exact_zero_is_known() -> None:
    scores = TopK.from_lists([[(3, -0.1), (4, -np.inf)]])
    logp, known = scores.at(np.array([4]))
    assert known[0]
    assert logp[0] == -np.inf


def test_the_ceiling_bounds_every_unlisted_probability() -> None:
    rng = np.random.default_rng(0)
    logp = random_logp(rng, 30, 50)
    for k in (1, 10, 49):
        scores = topk_of(logp, k)
        unlisted = np.sort(np.exp(logp), axis=1)[:, : 50 - k].max(axis=1)
        assert (scores.ceiling() >= unlisted - 1e-6).all()
        least = np.minimum(
            np.sort(np.exp(logp), axis=1)[:, 50 - k], 1.0 - np.exp(logp[np.arange(30)[:, None], scores.ids]).sum(axis=1)
        )
        np.testing.assert_allclose(scores.ceiling(), least, rtol=1e-4, atol=1e-7)
    assert np.isnan(TopK.from_lists([[], [(1, -0.5)]]).ceiling()).tolist() == [True, False]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_a_narrower_list_keeps_its_whole_mass_in_the_tail(k: int) -> None:
    rng = np.random.default_rng(1)
    scores = topk_of(random_logp(rng, 12, 30), 10)
    cut = scores.slice(k=k)
    np.testing.assert_allclose(cut.mass() + np.exp(cut.tail_logp.astype(np.float64)), 1.0, atol=1e-6)
    np.testing.assert_array_equal(cut.ids, scores.ids[:, :k])


def test_a_row_range_moves_the_start() -> None:
    scores = TopK(**FIELDS)
    part = scores.slice(slice(1, 2))
    assert part.start == 4
    np.testing.assert_array_equal(part.actual_ids, [9])
    assert scores.slice(slice(2, 2)).rows == 0
    with pytest.raises(ConfigError, match="contiguous"):
        scores.slice(slice(None, None, 2))
    with pytest.raises(ConfigError, match="k must"):
        scores.slice(k=0)
    with pytest.raises(ConfigError, match="rows must be a slice"):
        scores.slice(1)


def test_from_lists_sorts_dedupes_pads_and_measures_the_tail() -> None:
    scores = TopK.from_lists([[(1, -3.0), (2, -0.5), (1, -2.0)], None, [], [(5, float("nan")), (6, -1.0)]], start=7)
    np.testing.assert_array_equal(scores.ids, [[2, 1], [-1, -1], [-1, -1], [6, -1]])
    np.testing.assert_allclose(scores.logp[0], [-0.5, -2.0])
    assert scores.tail_logp[0] == pytest.approx(np.log(1 - np.exp(-0.5) - np.exp(-2.0)), rel=1e-6)
    np.testing.assert_array_equal(scores.signal, [True, False, False, True])
    assert np.isnan(scores.tail_logp[1:3]).all()
    assert scores.start == 7
    with pytest.raises(ResponseError, match="out of range"):
        TopK.from_lists([[(2**40, -1.0)]])


def test_concat_pads_to_the_widest_and_keeps_every_row() -> None:
    rng = np.random.default_rng(3)
    parts = [topk_of(random_logp(rng, 2, 20), 4), topk_of(random_logp(rng, 3, 20), 7)]
    whole = TopK.concat(parts)
    assert whole.k == 7
    assert whole.slice(slice(0, 2)).slice(k=4) == parts[0]
    np.testing.assert_array_equal(whole.logp[2:], parts[1].logp)
    assert (whole.ids[:2, 4:] == -1).all()
    assert TopK.concat([]).rows == 0
    for wrong in (parts[0], [parts[0], None], [[parts[0]]]):
        with pytest.raises(ConfigError, match="not a sequence of TopK"):
            TopK.concat(wrong)


def test_scores_pickle_and_compare_by_value() -> None:
    scores = TopK(**FIELDS)
    assert pickle.loads(pickle.dumps(scores)) == scores
    assert scores != scores.slice(slice(0, 1))
    assert scores != 3


def test_lists_of_every_shape_become_what_a_careful_loop_makes_of_them() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        lists = []
        for _ in range(rng.integers(0, 6)):
            size = rng.integers(0, 7)
            ids = rng.integers(0, 5, size)
            logp = np.where(rng.random(size) < 0.2, [np.nan] * size, np.round(rng.random(size) * -3 - 2, 1))
            lists.append(None if rng.random() < 0.2 else [(int(i), float(v)) for i, v in zip(ids, logp, strict=True)])
        wanted = []
        for position in lists:
            best: dict[int, float] = {}
            for token, value in position or []:
                if not np.isnan(value):
                    best[token] = max(value, best.get(token, -np.inf))
            wanted.append(sorted(best.items(), key=lambda entry: (-entry[1], entry[0])))
        scores = TopK.from_lists(lists)
        assert scores.k == max((len(row) for row in wanted), default=0)
        for row, entries in enumerate(wanted):
            assert scores.ids[row][: len(entries)].tolist() == [token for token, _ in entries]
            assert (scores.ids[row][len(entries) :] == -1).all()
            np.testing.assert_allclose(scores.logp[row][: len(entries)], [value for _, value in entries], rtol=1e-7)


@pytest.mark.parametrize(
    ("actual_id", "actual_logp", "words"),
    [
        (
            2,
            -1.7,
            r"the list and actual_logp disagree .*row 1 .*got actual_logp -1.7, expected -0.5, as in the list",
        ),
        (2, -np.inf, "disagree"),
        (4, -0.2, "disagree"),
    ],
)
def test_a_list_and_a_realised_logprob_that_contradict_each_other_are_refused(
    actual_id: int, actual_logp: float, words: str
) -> None:
    lists = [[(2, -0.5)], [(2, -0.5), (4, -np.inf)]]
    with pytest.raises(ResponseError, match=words):
        TopK.from_lists(lists, actual_ids=[2, actual_id], actual_logp=[-0.5, actual_logp])


def test_a_realised_logprob_that_agrees_with_its_list_or_is_unknown_is_taken() -> None:
    lists = [[(2, -0.5)], [(2, -0.5)], [(2, -0.5), (4, -np.inf)], [(2, -0.5)], None]
    scores = TopK.from_lists(lists, actual_ids=[2, 2, 4, 9, 9], actual_logp=[-0.501, np.nan, -np.inf, -1.5, -0.1])
    assert scores.rows == 5
