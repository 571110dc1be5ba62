"""Recorded values of the upstream implementations, where NumPy computes the same thing."""

import numpy as np
import pytest

from tests.topk.lists import cases, golden_json, log_softmax, number, positions
from topkd.topk import (
    TopK,
    entropy_bounds,
    gjs,
    gjs_advantage,
    scalar_kl_advantage,
    shared_support_gjs,
    topk_gjs,
    topk_weights,
)


def label(case: dict) -> str:
    return f"{case['id']:03d}"


@pytest.mark.parametrize("case", cases("gjs_advantage.npz"), ids=label)
def test_advantages_divergence_and_gradient_of_every_token(case: dict) -> None:
    beta, teacher = case["params"]["beta"], case["i"]["teacher_logprobs"]
    student = log_softmax(case["i"]["student_logits"].astype(np.float64))
    s = np.exp(student)
    advantage = gjs_advantage(teacher, student, beta)
    np.testing.assert_allclose(advantage, case["e"]["advantage_all_tokens"], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gjs(teacher, student, beta), case["e"]["divergence"], rtol=1e-11, atol=1e-13)
    score = np.eye(len(s)) - s
    np.testing.assert_allclose((s * advantage) @ score, -case["e"]["grad_student_logits"], atol=1e-12)
    as_advantage = (s * gjs(teacher, student, beta)) @ score
    np.testing.assert_allclose(as_advantage, case["e"]["divergence_as_advantage_expected_pg"], atol=1e-12)


@pytest.mark.parametrize("case", cases("jsd_dense.npz"), ids=label)
def test_dense_gjs_of_every_token_agrees_with_fifty_digits(case: dict) -> None:
    params = case["params"]
    if params["top_k"] is not None or "per_token_exact" not in case["e"]:
        pytest.skip("the top-k and probability forms belong to the logits losses")
    with np.errstate(invalid="ignore"):
        student, teacher = (
            log_softmax(case["i"][name].astype(np.float64) / params["temperature"])
            for name in ("student_logits", "teacher_logits")
        )
    expected = case["e"]["per_token_exact"]
    got = gjs(teacher, student, params["beta"])
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", cases("topk_shared_support.npz"), ids=label)
def test_shared_support_variants_agree_with_their_upstreams(case: dict) -> None:
    beta = case["params"]["beta"]
    teacher, student = case["i"]["teacher_topk_logprobs"], case["i"]["student_at_teacher_ids"]
    short = case["params"]["dtype"] == "float32"
    full = case["params"]["K"] == case["i"]["student_logits"].shape[-1]
    for tail, name in (("bucket", "tail"), ("renormalise", "renorm"), ("partial", "partial_sum")):
        expected = case["e"][name]
        # float32 upstream: a tail that is almost empty is rounding there, and exact here.
        thin = min((1 - np.exp(side.astype(float)).sum(-1)).min() for side in (teacher, student)) < 1e-3
        loose = 5e-4 if short and tail == "bucket" and thin else 5e-6
        atol = 5e-5 if full and tail == "bucket" and short else (loose if short else 1e-7 if full else 1e-11)
        np.testing.assert_allclose(
            shared_support_gjs(teacher, student, beta, tail), expected, rtol=5e-6 if short else 1e-9, atol=atol
        )
    dense = gjs(
        log_softmax(case["i"]["teacher_logits"].astype(np.float64)),
        log_softmax(case["i"]["student_logits"].astype(np.float64)),
        beta,
    )
    np.testing.assert_allclose(dense, case["e"]["dense"], rtol=2e-6 if short else 1e-10, atol=1e-12)


@pytest.mark.parametrize("case", cases("topk_shared_support.npz"), ids=label)
def test_lambda_zero_weights_are_the_gradient_of_the_tail_bucket_loss(case: dict) -> None:
    beta, logits = case["params"]["beta"], case["i"]["student_logits"].astype(np.float64)
    ids, listed = case["i"]["teacher_topk_ids"], case["i"]["teacher_topk_logprobs"]
    k, vocab = ids.shape[-1], logits.shape[-1]
    ids, listed, logits = ids.reshape(-1, k), listed.reshape(-1, k), logits.reshape(-1, vocab)
    expected = case["e"]["grad_tail_sum_student_logits"].reshape(-1, vocab)
    order = np.argsort(-listed, axis=1, kind="stable")
    ids, listed = np.take_along_axis(ids, order, axis=1), np.take_along_axis(listed, order, axis=1)
    student = log_softmax(logits)
    rows = len(ids)
    unknown = np.full(rows, np.nan)
    teacher = TopK(0, ids.astype(np.int32), listed, np.full(rows, -1), unknown, unknown)
    at = np.take_along_axis(student, ids, axis=1)
    empty = (1 - teacher.mass() < 1e-4) | (1 - np.exp(at).sum(axis=1) < 1e-4)
    weights, _ = topk_weights(teacher, at, unknown, beta=beta, lam=0.0)
    gradient = -(np.eye(vocab)[ids] * weights[..., None]).sum(axis=1) + weights.sum(axis=1)[:, None] * np.exp(student)
    np.testing.assert_allclose(gradient[~empty], expected[~empty], rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("case", cases("k_series.npz"), ids=label)
def test_whole_curves_over_k(case: dict) -> None:
    beta, order = case["params"]["beta"], case["i"]["order"]
    teacher, student = case["i"]["teacher_logprobs"][order], case["i"]["student_logprobs"][order]
    for tail, name in (("bucket", "tail"), ("renormalise", "renorm"), ("partial", "partial")):
        got = [float(shared_support_gjs(teacher[:k], student[:k], beta, tail)) for k in range(1, len(order) + 1)]
        np.testing.assert_allclose(got, case["e"][name], rtol=1e-7, atol=1e-6)  # the 1e-7 clamp of the tail
    np.testing.assert_allclose(gjs(teacher, student, beta), case["e"]["dense"], rtol=1e-10)


@pytest.mark.parametrize("case", golden_json("claas_gjs.json")["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize(
    ("missing", "ruling"),
    [("union_tail", "union_tail"), ("floor", "union_floor_renorm"), ("intersection_tail", "intersection_tail")],
)
def test_two_lists_follow_the_ruling(case: dict, missing: str, ruling: str) -> None:
    def resolved(lists: object) -> TopK:
        # -9999.0 stands for "not listed" in these cases: a dialect's business, done before the list is built.
        return TopK.from_lists([[entry for entry in row if entry[1] != -9999.0] for row in positions(lists)])

    teacher, student = resolved(case["teacher_topk"]), resolved(case["student_topk"])
    got = topk_gjs(teacher, student, case["alpha"], missing, case["floor"])
    expected = np.array([number(x) for x in case["ruling"][ruling]])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not (got < 0).any()


@pytest.mark.parametrize("case", golden_json("claas_datum.json")["cases"], ids=lambda case: case["name"])
def test_the_ruling_advantages_of_every_datum(case: dict) -> None:
    ruling = case["ruling"]
    if not ruling or "scalar_advantage" not in ruling:
        pytest.skip("no advantages recorded")
    teacher, student = case["teacher_logprobs"], case["student_logprobs"]
    np.testing.assert_allclose(scalar_kl_advantage(teacher, student), ruling["scalar_advantage"], atol=1e-13)
    got = gjs_advantage(teacher, student, case["alpha"])
    np.testing.assert_allclose(got, ruling["gjs_advantage"], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", cases("entropy_aware.npz"), ids=label)
def test_full_lists_give_the_recorded_teacher_entropy(case: dict) -> None:
    logp = log_softmax(case["i"]["teacher_logits"].astype(np.float64))
    logp = logp.reshape(-1, logp.shape[-1])
    vocab = logp.shape[1]
    scores = TopK.from_lists([list(enumerate(row)) for row in logp.tolist()])
    expected = case["e"]["teacher_entropy_T1"].ravel()
    low, high = entropy_bounds(scores, vocab)
    np.testing.assert_allclose(low, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(high, expected, rtol=1e-5, atol=1e-5)
    half = scores.slice(k=max(1, vocab // 2))
    low, high = entropy_bounds(half, vocab)
    assert (low <= expected + 1e-5).all()
    assert (expected <= high + 1e-5).all()
