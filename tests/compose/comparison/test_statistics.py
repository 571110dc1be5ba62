import math

import numpy as np
import pytest
from scipy import stats

from topkd.compose.comparison.summary import estimate_paired_ratio, judge_arms, summarize_arms, summarize_curve


def evals(values, step=100):
    return [{"tokens": i * step, "reverse_kl": value} for i, value in enumerate(values)]


def result(values):
    costs = dict.fromkeys(
        ("tokens", "teacher_calls", "teacher_tokens", "teacher_entries", "teacher_bytes", "clipped", "truncated"), 1
    )
    return {"evals": evals(values), **costs}


def test_area_is_the_mean_share_of_the_first_value_over_tokens():
    facts = summarize_curve(evals([2.0, 1.0, 1.0]), "reverse_kl", 0.5)
    assert facts["area"] == pytest.approx((0.75 * 100 + 0.5 * 100) / 200)
    assert facts["final"] == 1.0


def test_tokens_to_target_are_interpolated_between_evaluations():
    facts = summarize_curve(evals([2.0, 1.6, 0.8]), "reverse_kl", 0.6)  # share 1, .8, .4: crosses .6 half way
    assert facts["tokens_to_target"] == pytest.approx(150.0)
    assert not facts["censored"]


def test_a_run_that_never_arrives_is_censored_and_has_no_number():
    facts = summarize_curve(evals([2.0, 1.9, 1.8]), "reverse_kl", 0.5)
    assert facts["tokens_to_target"] is None
    assert facts["censored"]


def test_a_curve_with_a_hole_has_no_area_rather_than_a_flattering_one():
    facts = summarize_curve(evals([2.0, None, 0.1]), "reverse_kl", 0.5)
    assert math.isnan(facts["area"])
    assert facts["censored"]


@pytest.mark.parametrize("n", [2, 3, 8, 31, 40])
def test_the_paired_interval_is_the_t_interval_of_the_log_ratio(n):
    rng = np.random.default_rng(n)
    ours, reference = rng.uniform(0.5, 1, n), rng.uniform(0.8, 1.2, n)
    ratio = estimate_paired_ratio(ours, reference)
    expected = stats.ttest_rel(np.log(ours), np.log(reference)).confidence_interval(0.95)
    assert ratio["low"] == pytest.approx(math.exp(expected.low), rel=1e-5)
    assert ratio["high"] == pytest.approx(math.exp(expected.high), rel=1e-5)


def test_one_pair_has_a_ratio_and_no_interval():
    assert estimate_paired_ratio([0.5], [1.0]) == {"ratio": 0.5, "low": None, "high": None, "pairs": 1}


def test_pairing_sees_a_small_difference_under_a_large_spread_between_seeds():
    seeds = range(4)
    level = {0: 1.0, 1: 2.0, 2: 4.0, 3: 8.0}
    slopes = {("ref", s): [level[s], level[s] * 0.9] for s in seeds} | {
        ("ours", s): [level[s], level[s] * (0.7 + 0.01 * s)] for s in seeds
    }
    rows = summarize_arms(["ref", "ours"], {key: result(v) for key, v in slopes.items()}, seeds, "reverse_kl", 0.8)
    said = judge_arms(rows, {"ref": "Ref", "ours": "Ours"}, "reverse_kl")
    assert said["winner"] == "ours"
    assert "Ours wins" in said["text"]
    assert rows[1]["final_ratio"]["high"] < 0.85


def test_arms_whose_interval_reaches_one_have_no_winner():
    curves = {("a", 0): [1, 0.5], ("a", 1): [1, 0.9], ("b", 0): [1, 0.6], ("b", 1): [1, 0.8]}
    rows = summarize_arms(["a", "b"], {key: result(v) for key, v in curves.items()}, (0, 1), "reverse_kl", 0.8)
    said = judge_arms(rows, {"a": "A", "b": "B"}, "reverse_kl")
    assert said["winner"] is None
    assert said["text"].startswith("No clear winner")


def test_a_single_seed_names_the_smallest_area_without_calling_it_a_win():
    curves = {("a", 0): [1, 0.5], ("b", 0): [1, 0.9]}
    rows = summarize_arms(["a", "b"], {key: result(v) for key, v in curves.items()}, (0,), "reverse_kl", 0.8)
    said = judge_arms(rows, {"a": "A", "b": "B"}, "reverse_kl")
    assert said["winner"] is None
    assert "a single pair has no spread" in said["text"]


def test_tokens_ratio_takes_only_pairs_in_which_both_arrived_and_counts_the_rest():
    curves = {("a", 0): [1, 0.5], ("a", 1): [1, 0.5], ("b", 0): [1, 0.95], ("b", 1): [1, 0.75]}
    rows = summarize_arms(["a", "b"], {key: result(v) for key, v in curves.items()}, (0, 1), "reverse_kl", 0.8)
    assert rows[1]["censored"] == 1
    assert rows[1]["tokens_ratio"]["pairs"] == 1
    assert rows[1]["tokens_ratio"]["ratio"] == pytest.approx(80 / 40)


def test_an_arm_whose_curve_has_a_hole_is_named_and_not_ranked():
    curves = {("a", 0): [1, 0.5], ("b", 0): [1, 0.9], ("c", 0): [1, None]}
    rows = summarize_arms(["a", "b", "c"], {key: result(v) for key, v in curves.items()}, (0,), "reverse_kl", 0.8)
    said = judge_arms(rows, {"a": "A", "b": "B", "c": "C"}, "reverse_kl")
    assert said["best"] == "a"
    assert said["text"].endswith("Not ranked, because their curves are incomplete: C.")
