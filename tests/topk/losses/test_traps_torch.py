"""The traps that need torch, by number (tests/golden/traps.json): the right value, and that it is not the naive one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses import (
    KDLoss,
    SparseTeacher,
    entropy_aware_opd_loss,
    eopd_loss,
    generalized_jsd_loss,
    importance_sampling_loss,
    sparse_divergence_loss,
    taid_loss,
    topk_policy_gradient_loss,
)
from topkd.topk.losses.divergence import divergence, divergence_terms, log_tail_torch
from topkd.topk.losses.sparse import bins

TRAPS = {trap["id"]: trap for trap in json.loads((Path(__file__).parents[2] / "golden" / "traps.json").read_text())}


def trap(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return TRAPS[name]["input"], TRAPS[name]["naive"], TRAPS[name]["right"]


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(ids: list[int], logp: list[float], y: int = -1, y_logp: float = math.nan) -> SparseTeacher:
    return SparseTeacher(
        torch.tensor([ids]), f64([logp]), log_tail_torch(f64([logp])), torch.tensor([y]), f64([y_logp])
    )


def test_t01_scalars_are_enough_for_the_gjs_gradient_of_a_token_outside_the_list() -> None:
    given, _, right = trap("T01")
    for teacher, student, wanted in zip(
        given["teacher_lp"], given["student_rollout_lp"], right["gjs_advantages"], strict=True
    ):
        logp = f64([student]).requires_grad_()
        # a list that shares its tail's ratio with nothing: g_o = 0 when both tails are equal
        teacher_row = row([0], [math.log(0.5)], y=5, y_logp=teacher)
        loss = topk_policy_gradient_loss(f64([[math.log(0.5)]]), logp, teacher_row, lam=1.0, beta=given["beta"])
        assert -torch.autograd.grad(loss, logp)[0].item() == pytest.approx(wanted, abs=1e-12)


def test_t02_the_ratio_is_that_of_the_exact_rollout_logprob() -> None:
    given, naive, right = trap("T02")
    new = f64([given["logp_new"]]).requires_grad_()
    for behavior, ratio in ((given["true_behavior_lp"], right["ratio"]), (naive["behavior_lp"], naive["ratio"])):
        loss = importance_sampling_loss(new, f64([behavior]), f64([1.0]))
        assert -torch.autograd.grad(loss, new)[0].item() == pytest.approx(ratio, rel=1e-9)


def test_t04_the_gradient_of_a_disliked_token_lowers_it_and_the_divergence_would_raise_it() -> None:
    given, naive, right = trap("T04")
    teacher, student = f64(given["teacher"]), f64(given["student"])
    y = given["sampled"]
    value = divergence(teacher, student, given["beta"]).item()
    assert value == pytest.approx(naive["advantage"])
    half = f64([[math.log(0.5)]])
    logp = student[y : y + 1].clone().requires_grad_()
    loss = topk_policy_gradient_loss(
        half, logp, row([9], [math.log(0.5)], y=y, y_logp=float(teacher[y])), lam=1.0, beta=given["beta"]
    )
    assert -torch.autograd.grad(loss, logp)[0].item() == pytest.approx(right["advantage"], abs=1e-9)


def test_t06_and_t07_no_token_is_zero_and_one_token_is_itself() -> None:
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss = importance_sampling_loss(empty, empty.detach(), empty.detach())
    loss.backward()
    assert loss.item() == 0.0
    given, _, right = trap("T07")
    advantage = f64(given["teacher_lp"]) - f64(given["student_lp"])
    one = importance_sampling_loss(f64(given["student_lp"]), f64(given["student_lp"]), advantage)
    assert one.item() == pytest.approx(-right["advantage"])


def test_t12_a_row_without_a_signal_is_masked_and_not_a_divergence_of_zero() -> None:
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    full = row([1, 2], [-0.5, -1.5])
    hole = SparseTeacher(
        torch.tensor([[1, 2], [-1, -1]]),
        f64([[-0.5, -1.5], [-math.inf, -math.inf]]),
        f64([float(full.tail_logp), 0.0]),
        torch.tensor([-1, -1]),
        f64([math.nan, math.nan]),
    )
    loss = sparse_divergence_loss(logits, hole)
    assert loss.item() == pytest.approx(sparse_divergence_loss(logits[:1], full).item())
    assert not torch.autograd.grad(loss, logits)[0][1].any()


def test_t14_an_exact_zero_contributes_nothing_instead_of_nan() -> None:
    teacher, student = f64([math.log(0.5), math.log(0.5), -math.inf]), f64([-math.inf, math.log(0.25), math.log(0.75)])
    student.requires_grad_()
    value = divergence(teacher, student, 0.5)
    m = [0.25, 0.375, 0.375]
    wanted = 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    wanted += 0.5 * (0.25 * math.log(0.25 / m[1]) + 0.75 * math.log(0.75 / m[2]))
    assert value.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()
    assert math.isnan((teacher.exp() * (teacher - student)).sum().item())  # the unguarded form


def test_t15_a_list_that_sums_to_more_than_one_has_a_tail_of_1e_7() -> None:
    given, _, right = trap("T15")
    logp = f64([pair[1] for pair in given["pairs"]])
    assert logp.exp().sum() > 1
    assert log_tail_torch(logp).item() == pytest.approx(right["tail"], abs=1e-9)


def test_t16_a_bucket_is_never_tempered_and_the_renormalised_list_is_exact() -> None:
    given, _, right = trap("T16")
    logp = f64(given["logprobs"])[: given["K"]]
    rows = row(list(range(given["K"])), logp.tolist())
    teacher, _ = bins(logp[None], rows, "renormalise", given["temperature"])
    torch.testing.assert_close(teacher[0], f64(right["renormalised_topk_is_exact"]))
    with pytest.raises(ConfigError, match="cannot have a temperature"):
        sparse_divergence_loss(torch.zeros(1, 6), rows, temperature=given["temperature"])


def test_t17_the_ends_are_kls_and_discontinuous_with_the_interior() -> None:
    given, naive, right = trap("T17")
    teacher, student = f64(given["teacher"]), f64(given["student"])
    assert divergence(teacher, student, 0.0).item() == pytest.approx(right["beta_0"])
    assert divergence(teacher, student, 1e-6).item() == pytest.approx(right["beta_1e_minus_6"], rel=1e-4)
    assert divergence(teacher, student, 0.0).item() != naive["formula_at_0"]


def test_t18_beta_one_is_reverse_kl_whatever_the_order() -> None:
    given, _, right = trap("T18")
    teacher, student = (dict(given[side]) for side in ("teacher", "student"))
    for order in ([0, 1], [1, 0]):
        value = divergence(f64([teacher[v] for v in order]), f64([student[v] for v in order]), 1.0)
        assert value.item() == pytest.approx(right["kl_student_teacher"])


def test_t19_the_truncated_weight_is_detached() -> None:
    given, naive, right = trap("T19")
    new = f64(given["logp_new"]).requires_grad_()
    loss = importance_sampling_loss(new, f64(given["logp_beh"]), f64(given["adv"]), cap=given["cap"])
    assert torch.autograd.grad(loss, new)[0].tolist() == right["detached_truncated_weight_grad"]
    clamped = -((new - f64(given["logp_beh"])).exp().clamp(max=given["cap"]) * f64(given["adv"])).sum()
    assert torch.autograd.grad(clamped, new)[0].tolist() == naive["grad"]


def test_t20_the_behaviour_stays_the_rollouts_after_a_step() -> None:
    given, naive, right = trap("T20")
    new = f64([given["policy_lp_after_step1"]]).requires_grad_()
    loss = importance_sampling_loss(new, f64([given["rollout_lp"]]), f64([1.0]))
    ratio = -torch.autograd.grad(loss, new)[0].item()
    assert ratio == pytest.approx(right["ratio_step2"])
    assert ratio != pytest.approx(naive["ratio_step2"])


@pytest.mark.parametrize("call", ["jsd", "kd", "taid", "is"])
def test_t22_integer_masks_are_refused_and_the_boolean_one_is_the_same_as_labels(call: str) -> None:
    given, _, right = trap("T22")
    mask01, labels, boolean = (
        torch.tensor(given["mask01"]),
        torch.tensor(given["labels"]),
        torch.tensor(right["one_boolean_mask"]),
    )
    student, teacher = torch.randn(1, 4, 9), torch.randn(1, 4, 9)
    losses = {
        "jsd": lambda mask: generalized_jsd_loss(student, teacher, mask),
        "kd": lambda mask: KDLoss()(student, teacher, mask),
        "taid": lambda mask: taid_loss(student, teacher, mask, t=0.5),
        "is": lambda mask: importance_sampling_loss(student[..., 0], student[..., 0], teacher[..., 0], mask),
    }
    with pytest.raises(ConfigError, match=r"mask"):
        losses[call](mask01)
    wanted = losses[call](boolean)
    if call in ("jsd", "kd"):
        assert losses[call](labels).item() == wanted.item()
    else:
        with pytest.raises(ConfigError, match="must be boolean"):
            losses[call](labels)


def test_t23_shifted_labels_judge_the_rows_that_predict_them() -> None:
    given, naive, right = trap("T23")
    length, prompt = given["seq_len"], given["prompt_len"]
    student = torch.randn(1, length, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.full((1, length), -100)
    labels[0, prompt:] = torch.arange(2, 2 + length - prompt)
    for shift, rows in ((True, right["causal_rows"]), (False, naive["openrlhf_rows"])):
        loss = KDLoss()(student, torch.randn(1, length, 7, dtype=torch.float64), labels, shift=shift)
        touched = torch.autograd.grad(loss, student)[0][0].abs().sum(-1).nonzero()[:, 0].tolist()
        assert touched == rows


def test_t24_nan_at_masked_positions_never_reaches_the_sum() -> None:
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    with torch.no_grad():
        student[0] = math.nan
    teacher[0] = math.nan
    mask = torch.tensor([False, True])
    for loss in (generalized_jsd_loss(student, teacher, mask), taid_loss(student, teacher, mask, t=0.5)):
        (gradient,) = torch.autograd.grad(loss, student)
        assert math.isfinite(loss.item())
        assert not gradient[0].any()
        assert gradient[1].any()


def test_t25_nan_at_a_valid_position_stays_nan_and_is_never_no_divergence() -> None:
    broken, fine = torch.tensor([[math.nan, 0.0, 0.0]]), torch.zeros(1, 3)
    for student, teacher in ((broken, fine), (fine, broken)):
        for beta in (0.0, 0.5, 1.0):
            assert math.isnan(generalized_jsd_loss(student, teacher, beta=beta).item())
        assert math.isnan(taid_loss(student, teacher, t=0.5).item())
        assert math.isnan(KDLoss()(student, teacher, None).item())
        assert math.isnan(entropy_aware_opd_loss(student, teacher).item())
        assert math.isnan(eopd_loss(student, teacher, sampled_ids=torch.tensor([1])).item())
    rows = row([1, 2], [-0.5, -1.5], y=0, y_logp=-2.0)
    assert math.isnan(sparse_divergence_loss(broken, rows).item())
    for at_ids, actual in ((f64([[math.nan, -1.0]]), f64([-2.0])), (f64([[-1.0, -1.0]]), f64([math.nan]))):
        assert math.isnan(topk_policy_gradient_loss(at_ids, actual, rows).item())


def test_t28_token_clip_bounds_each_entry_and_per_token_clip_the_token() -> None:
    given, naive, right = trap("T28")
    terms = f64(given["terms"])
    assert terms.clamp(max=given["clip"]).sum().item() == pytest.approx(right["opsd_per_entry"])
    student, teacher = f64([[2.0, 0.0, -1.0]]), f64([[-1.0, 0.5, 2.0]])
    entries = divergence_terms(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1), 0.0)
    clip = given["clip"]
    assert generalized_jsd_loss(student, teacher, beta=0.0, token_clip=clip).item() == pytest.approx(
        entries.clamp(max=clip).sum().item()
    )
    assert generalized_jsd_loss(student, teacher, beta=0.0, token_clip=clip).item() < 0
    assert generalized_jsd_loss(student, teacher, beta=0.0, per_token_clip=clip).item() == pytest.approx(
        naive["clip_after_sum"]
    )


def test_t30_one_listed_token_is_compared_through_its_tail() -> None:
    given, naive, right = trap("T30")
    teacher, student = given["teacher"][0][1], given["student"][0][1]
    rest = math.log((1 - math.exp(student)) / 8)
    logits = torch.full((1, 9), rest, dtype=torch.float64)
    logits[0, given["teacher"][0][0]] = student
    rows = row([given["teacher"][0][0]], [teacher])
    assert sparse_divergence_loss(logits, rows, beta=given["beta"]).item() == pytest.approx(right["tail"], rel=1e-9)
    assert sparse_divergence_loss(logits, rows, tail="renormalise").item() == naive["renorm"]


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_t32_padded_vocabulary_and_dead_rows_stay_finite_at_the_ends_of_taid(t: float) -> None:
    student, teacher = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    student[:, 5] = teacher[:, 5] = -math.inf
    student[1] = -math.inf
    student.requires_grad_()
    loss = taid_loss(student, teacher, t=t)
    (gradient,) = torch.autograd.grad(loss, student)
    assert math.isfinite(loss.item())
    assert torch.isfinite(gradient).all()
    assert torch.isnan((1 - t) * student.detach() + t * teacher).any()  # the naive blend
