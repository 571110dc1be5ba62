"""Every trap of the maths that needs no torch, by its number: the right value, and that the naive one is not given."""

import json
import math

import numpy as np
import pytest

from tests.topk.lists import golden_json, positions
from topkd.topk import (
    SampleCore,
    SamplingParams,
    ScalarBehavior,
    ScalarPreparedSample,
    TopK,
    TopKBehavior,
    TopKPreparedSample,
    compute_topk_gjs,
    discounted_return,
    extract_token_logprobs,
    gjs,
    gjs_advantage,
    kl_k1,
    scalar_kl_advantage,
    shared_support_gjs,
    slice_completion_topk,
    topk_gjs,
    topk_weights,
)
from topkd.topk.errors import AlignmentError, ConfigError, DataError, KLimitError, ResponseError, RetryableServerError
from topkd.topk.types import tail_logp
from topkd.topk.wire import dumps, loads_sample

TRAPS = {trap["id"]: trap for trap in golden_json("traps.json")}


def trap(name: str) -> tuple[dict, dict, dict]:
    return TRAPS[name]["input"], TRAPS[name]["naive"], TRAPS[name]["right"]


def one(lists: list) -> TopK:
    return TopK.from_lists(positions([lists]))


def test_t01_the_first_step_of_a_top_k_run_is_gjs_from_scalars_not_scalar_kl() -> None:
    given, naive, right = trap("T01")
    got = gjs_advantage(given["teacher_lp"], given["student_rollout_lp"], given["beta"])
    np.testing.assert_allclose(got, right["gjs_advantages"], rtol=1e-12)
    assert not np.allclose(got, naive["advantages"], atol=0.1)


def test_t02_the_ratio_uses_the_exact_rollout_logprob_not_a_floored_entry() -> None:
    given, naive, right = trap("T02")
    listed = TopK.from_lists(
        positions([given["student_topk"]]),
        actual_ids=[given["sampled_token"]],
        actual_logp=[given["true_behavior_lp"]],
    )
    behavior = TopKBehavior(np.array([given["true_behavior_lp"]]), listed)
    assert math.exp(given["logp_new"] - float(behavior.logp[0])) == pytest.approx(right["ratio"])
    floored = extract_token_logprobs([given["student_topk"]], [given["sampled_token"]], given["floor"])[0]
    assert math.exp(given["logp_new"] - floored) == pytest.approx(naive["ratio"])
    looked_up, known = TopK.from_lists(positions([given["student_topk"]])).at(np.array([given["sampled_token"]]))
    assert not known[0]
    assert np.isnan(looked_up[0])


def test_t03_a_floored_teacher_logprob_never_becomes_an_advantage() -> None:
    given, naive, right = trap("T03")
    student = [given["student_lp"]]
    assert scalar_kl_advantage([given["true_teacher_lp"]], student)[0] == pytest.approx(right["advantage"])
    unlisted = extract_token_logprobs([[(1, -0.1)]], [9], floor_logprob=None)
    assert np.isnan(scalar_kl_advantage(unlisted, student)[0])
    assert scalar_kl_advantage([given["floor"]], student)[0] == pytest.approx(naive["advantage"])


def test_t04_the_divergence_is_not_the_advantage() -> None:
    given, naive, right = trap("T04")
    teacher, student, token = np.array(given["teacher"]), np.array(given["student"]), given["sampled"]
    assert gjs_advantage(teacher, student, given["beta"])[token] == pytest.approx(right["advantage"], rel=1e-12)
    assert gjs(teacher, student, given["beta"]) == pytest.approx(naive["advantage"], rel=1e-12)
    with pytest.raises(ConfigError, match="does not depend on the sampled token"):
        discounted_return(None, [0.25], 0.0)


def core(prompt: list[int], completion: list[int], teacher_prompt: list[int] | None = None) -> SampleCore:
    return SampleCore(
        np.array(prompt + completion, dtype=np.int32),
        len(prompt),
        np.ones(len(completion), dtype=np.bool_),
        np.array(teacher_prompt or prompt, dtype=np.int32),
    )


def test_t05_the_kind_of_a_sample_has_no_default_that_could_override_it() -> None:
    sample = TopKPreparedSample(
        core([1, 2], [4]),
        ScalarBehavior(np.array([-0.5])),
        TopK.from_lists([[(4, -0.1)]], start=1, actual_ids=[4], actual_logp=[-0.1]),
    )
    plain = json.loads(dumps(sample))
    assert plain["kind"] == "topk"
    assert loads_sample(json.dumps(plain)).kind == "topk"
    for change in ({"kind": "scalar"}, {"kind": None}):
        with pytest.raises(DataError):
            loads_sample(json.dumps({**plain, **change}))
    del plain["kind"]
    with pytest.raises(DataError, match="kind"):
        loads_sample(json.dumps(plain))


def test_t06_an_empty_completion_is_no_error_and_no_token() -> None:
    given, _, right = trap("T06")
    none = np.array([], dtype=np.float32)
    sample = ScalarPreparedSample(core(given["prompt"], given["completion"]), ScalarBehavior(none), none)
    assert int(sample.core.mask.sum()) == right["counted_tokens"]
    assert gjs_advantage(sample.teacher_logp, sample.behavior.logp, 0.5).tolist() == right["advantages"]
    assert discounted_return(none, none, 0.9).tolist() == []
    empty = TopK.from_lists([], actual_ids=[], actual_logp=[])
    assert topk_gjs(empty, empty, 0.5).tolist() == []
    weights = topk_weights(empty, np.empty((0, 0)), none, beta=0.5, lam=0.3)
    assert [w.size for w in weights] == [0, 0]


def test_t07_a_completion_of_one_token_stands_at_prompt_len_minus_one() -> None:
    given, _, right = trap("T07")
    one_token = core(given["prompt"], given["completion"])
    assert one_token.target_ids.size == right["shifted_length"]
    assert one_token.target_ids[right["advantage_index"]] == given["completion"][0]
    got = scalar_kl_advantage(given["teacher_lp"], given["student_lp"])
    assert got.tolist() == pytest.approx([right["advantage"]])


def test_t08_the_slice_starts_at_prompt_len_and_the_extra_entry_is_the_realised_token() -> None:
    given, naive, right = trap("T08")
    full = [
        None
        if position is None
        else [(int(token), entry["logprob"]) for token, entry in sorted(position.items(), key=lambda x: x[1]["rank"])]
        for position in given["prompt_logprobs"]
    ]
    prompt, realised = given["prompt_len"], given["sequence"][given["prompt_len"] :]
    completion = slice_completion_topk(full, prompt, len(realised))
    actual = extract_token_logprobs(completion, realised, floor_logprob=None)
    assert actual == right["actual"]
    listed = [row[: given["top_k"]] for row in completion]
    assert [[list(entry) for entry in row] for row in listed] == right["support_rank_sorted"]
    scores = TopK.from_lists(listed, start=prompt - 1, actual_ids=realised, actual_logp=actual)
    assert scores.at(np.array(realised))[0].tolist() == pytest.approx(right["actual"])
    assert 99 not in scores.ids
    shifted = extract_token_logprobs(slice_completion_topk(full, prompt - 1, 3), given["sequence"][prompt - 1 : -1])
    assert shifted != right["actual"]
    assert naive["off_by_one_minus"] != right["actual"]


def test_t09_entries_are_keyed_by_id_so_no_spelling_merges_them() -> None:
    given, naive, right = trap("T09")
    # The recorded example sums to 1.03, which no server's list may; a tenth of a nat less makes it a distribution.
    entries = [(entry["token"], entry["logprob"] - 0.1) for entry in given["top_logprobs"]]
    scores = TopK.from_lists([[(token, logp) for token, (_, logp) in enumerate(entries)]])
    assert int(scores.listed.sum()) == right["n_entries"]
    by_text = {text.strip(): logp for text, logp in entries}
    lost = scores.mass()[0] - sum(math.exp(value) for value in by_text.values())
    assert lost == pytest.approx(naive["lost_mass"] * math.exp(-0.1), rel=1e-6)


def test_t10_a_repeated_id_is_one_event() -> None:
    given, naive, right = trap("T10")
    scores = one(given["pairs"])
    assert dict(zip(scores.ids[0].tolist(), scores.logp[0].tolist(), strict=True)) == pytest.approx(
        {int(token): value for token, value in right["dict"].items()}
    )
    assert scores.mass()[0] < 1.0 < naive["counted_twice_mass"]
    twice = np.array([[value for _, value in given["pairs"]]])
    with pytest.raises(ResponseError):
        TopK(0, np.array([[5, 5, 7]]), np.sort(twice)[:, ::-1], np.array([5]), np.array([-0.1]), np.array([np.nan]))


def test_t11_position_zero_is_masked_and_a_prompt_of_no_token_is_refused() -> None:
    given, naive, right = trap("T11")
    full = [None, [(5, -0.1)]]
    rows = slice_completion_topk(full, 0, 2)
    got = extract_token_logprobs(rows, given["sequence"], floor_logprob=None)
    assert [not math.isnan(x) for x in got] == right["mask"]
    assert got[0] not in (naive["claas_scalar"][0], naive["claas_topk_extract"][0])
    assert TopK.from_lists(rows).signal.tolist() == right["mask"]
    with pytest.raises(AlignmentError, match="prompt_len"):
        SampleCore(np.array([3, 5]), 0, np.ones(2, dtype=np.bool_), np.array([3]))


def test_t12_a_null_inside_the_completion_is_masked_and_not_a_distribution_that_is_all_tail() -> None:
    _, _, right = trap("T12")
    teacher = TopK.from_lists([[(5, -0.1)], None], actual_ids=[5, 6], actual_logp=[-0.1, np.nan])
    student = TopK.from_lists([[(5, -0.3)], []], actual_ids=[5, 6], actual_logp=[-0.3, -1.0])
    for missing in ("union_tail", "intersection_tail", "floor"):
        assert np.isfinite(topk_gjs(teacher, student, 0.5, missing)).tolist() == right["mask"]
    weights, tail = topk_weights(teacher, np.array([[-0.3], [-0.3]]), np.array([-0.3, -1.0]), beta=0.5, lam=0.0)
    assert np.isfinite(weights[:, 0]).tolist() == right["mask"]
    assert np.isfinite(tail).tolist() == right["mask"]
    assert np.isnan(shared_support_gjs(np.full((1, 4), -np.inf), np.full((1, 4), -np.inf), 0.5)[0])


def test_t13_ids_that_only_the_student_lists_count() -> None:
    given, naive, right = trap("T13")
    got = topk_gjs(one(given["teacher"]), one(given["student"]), given["beta"])[0]
    assert got == pytest.approx(right["union_tail"], abs=1e-6)
    source = compute_topk_gjs([given["teacher"]], [given["student"]], given["beta"])
    assert source == pytest.approx([naive["claas"]])


def test_t14_an_exact_zero_contributes_nothing_and_nan_is_dropped() -> None:
    zero = TopK.from_lists([[(1, -0.2), (2, float("-inf")), (3, float("nan"))]])
    assert zero.ids[0].tolist() == [1, 2]
    other = TopK.from_lists([[(1, -0.2), (2, -2.5)]])
    for beta in (0.0, 0.3, 0.5):
        assert np.isfinite(topk_gjs(zero, other, beta)[0])
        assert np.isfinite(shared_support_gjs(zero.logp, other.logp, beta)[0])
    assert topk_gjs(zero, other, 1.0)[0] == math.inf
    assert np.isfinite(gjs_advantage([-math.inf], [-2.5], 0.5)[0])


def test_t15_a_list_that_sums_to_slightly_more_than_one_has_a_tail_of_1e_7() -> None:
    given, _, right = trap("T15")
    logp = np.array([[value for _, value in given["pairs"]]])
    other = np.log([[0.5, 0.4]])
    clamped = np.append(logp[0], right["tail"])
    expected = shared_support_gjs(clamped, np.append(other[0], math.log(0.1)), 0.5, "partial")
    assert shared_support_gjs(logp, other, 0.5)[0] == pytest.approx(float(expected), rel=1e-6)
    scores = one(given["pairs"])
    assert scores.tail_logp[0] == -np.inf
    for missing in ("union_tail", "intersection_tail"):
        assert np.isfinite(topk_gjs(scores, TopK.from_lists([[(0, -0.7), (1, -0.9)]]), 0.5, missing)[0])
    assert np.isfinite(tail_logp(logp[:, :1])[0])


def test_t16_only_the_renormalised_form_can_be_tempered_on_the_client() -> None:
    given, naive, right = trap("T16")
    logp, k, tau = np.array(given["logprobs"]), given["K"], given["temperature"]
    tempered = logp[:k] / tau
    renormalised = tempered - np.log(np.exp(tempered).sum())
    np.testing.assert_allclose(renormalised, right["renormalised_topk_is_exact"], rtol=1e-12)
    exact = logp / tau - np.log(np.exp(logp / tau).sum())
    np.testing.assert_allclose(exact[:k], right["exact"], rtol=1e-9)
    np.testing.assert_allclose(tempered, naive["divide_then_tail"][:k], rtol=1e-12)
    other = np.log([0.5, 0.3, 0.1])
    with pytest.raises(ConfigError, match="mass above 1"):
        shared_support_gjs(tempered, other, 0.5, "bucket")
    with pytest.raises(ResponseError, match="mass"):
        TopK.from_lists([list(enumerate(tempered.tolist()))])


def test_t17_the_ends_are_kls_and_discontinuous_with_the_interior() -> None:
    given, naive, right = trap("T17")
    teacher, student = given["teacher"], given["student"]
    assert float(gjs(teacher, student, 0.0)) == pytest.approx(right["beta_0"], rel=1e-12)
    assert float(gjs(teacher, student, 1e-6)) == pytest.approx(right["beta_1e_minus_6"], rel=1e-6)
    assert float(gjs(teacher, student, 0.0)) != naive["formula_at_0"]


def test_t18_alpha_one_is_a_kl_whatever_the_order_of_the_list() -> None:
    given, naive, right = trap("T18")
    teacher, student = given["teacher"], given["student"]
    for order in (1, -1):
        got = compute_topk_gjs([teacher[::order]], [student], 1.0)
        assert got == pytest.approx([right["kl_student_teacher"]], rel=1e-12)
    assert naive["claas"] < 0


def test_t21_the_mean_kl_has_the_sign_of_a_kl() -> None:
    given, naive, right = trap("T21")
    teacher, student = given["teacher_lp"], given["student_lp"]
    assert kl_k1(teacher, student).mean() == pytest.approx(right["kl_student_teacher_estimate"])
    assert scalar_kl_advantage(teacher, student).mean() == pytest.approx(naive["kl_mean"])


def test_t22_a_mask_is_boolean_and_nothing_else() -> None:
    given, _, right = trap("T22")
    for wrong in (given["mask01"][0], given["labels"][0]):
        with pytest.raises(ConfigError, match="boolean"):
            SampleCore(np.arange(5), 1, np.array(wrong), np.array([0]))
    good = SampleCore(np.arange(5), 1, np.array(right["one_boolean_mask"][0]), np.array([0]))
    assert good.mask.tolist() == right["one_boolean_mask"][0]


def test_t25_a_missing_position_is_nan_and_never_no_divergence() -> None:
    unknown, some = np.array([[np.nan, -1.0]]), np.array([[-0.7, -1.0]])
    for beta in (0.0, 0.5, 1.0):
        for tail in ("bucket", "renormalise", "partial"):
            assert np.isnan(shared_support_gjs(unknown, some, beta, tail)).all()
            assert np.isnan(shared_support_gjs(some, unknown, beta, tail)).all()
        assert np.isnan(topk_gjs(TopK.from_lists([[]]), TopK.from_lists([[(1, -0.1)]]), beta)).all()
    assert math.isnan(compute_topk_gjs([[]], [[(1, -0.1)]], 0.5)[0])


def test_t26_each_side_has_its_own_prompt_length() -> None:
    given, naive, right = trap("T26")
    student, teacher, length = given["student_prompt_len"], given["teacher_prompt_len"], given["completion_len"]
    completion = list(range(100, 100 + length))
    one_core = core(list(range(student)), completion, list(range(teacher)))
    first, last = right["student_slice"]
    assert one_core.full_ids[first:last].tolist() == completion
    scores = {"actual_ids": completion, "actual_logp": [-1.0] * length}
    behavior = ScalarBehavior(np.full(length, -1.0))
    listed = [[(1, -0.5)]] * length
    good = TopKPreparedSample(
        one_core, behavior, TopK.from_lists(listed, start=right["teacher_slice"][0] - 1, **scores)
    )
    assert good.teacher.start == teacher - 1
    with pytest.raises(AlignmentError, match="not the prompt length"):
        TopKPreparedSample(one_core, behavior, TopK.from_lists(listed, start=naive["teacher_slice"][0] - 1, **scores))


def test_t27_k_above_the_limit_is_final_and_never_retried() -> None:
    given, _, _ = trap("T27")
    error = KLimitError("K above the server's limit", got=given["teacher_top_k"], expected=given["vllm_max_logprobs"])
    error.limit = given["vllm_max_logprobs"]
    assert not isinstance(error, RetryableServerError)
    assert error.exit_code == 2
    assert "100" in str(error)


def test_t29_disjoint_lists_are_maximally_different() -> None:
    given, naive, right = trap("T29")
    teacher, student = one(given["teacher"]), one(given["student"])
    assert topk_gjs(teacher, student, given["beta"])[0] == pytest.approx(right["union_tail"], abs=1e-6)
    source = compute_topk_gjs([given["teacher"]], [given["student"]], given["beta"])
    assert source == pytest.approx([naive["claas"]], abs=1e-12)
    assert topk_gjs(teacher, student, given["beta"], "intersection_tail")[0] == pytest.approx(0.0, abs=1e-12)


def test_t30_one_listed_token_is_compared_through_its_tail() -> None:
    given, naive, right = trap("T30")
    teacher, student = one(given["teacher"]), one(given["student"])
    assert topk_gjs(teacher, student, given["beta"])[0] == pytest.approx(right["tail"], abs=1e-6)
    assert shared_support_gjs(teacher.logp, student.logp, given["beta"])[0] == pytest.approx(right["tail"], abs=1e-6)
    assert shared_support_gjs(teacher.logp, student.logp, given["beta"], "renormalise")[0] == naive["renorm"]


def test_t31_a_truncating_sampler_is_not_the_policy() -> None:
    given, _, _ = trap("T31")
    assert not SamplingParams(**given["sampling"]).exact
    assert SamplingParams().exact
