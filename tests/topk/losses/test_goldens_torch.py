"""The torch losses against values computed by running the upstream implementations (tests/golden/PROVENANCE.md)."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from topkd.topk.losses import (
    KDLoss,
    SparseTeacher,
    TAIDScheduler,
    entropy_aware_opd_loss,
    eopd_loss,
    generalized_jsd_loss,
    importance_sampling_loss,
    ppo_clip_loss,
    reinforce_loss,
    sparse_divergence_loss,
    taid_loss,
    teacher_entropy,
)
from topkd.topk.losses.divergence import divergence, log_softmax, log_tail_torch
from topkd.topk.losses.entropy import forward_kl_on_top
from topkd.topk.losses.jsd import append_tail
from topkd.topk.losses.policy import importance_ratio
from topkd.topk.losses.topk_policy import advantage

GOLDEN = Path(__file__).parents[2] / "golden"


@cache
def load(name: str) -> tuple[dict[int, dict[str, Any]], dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    return {case["id"]: case for case in json.loads(bytes(arrays["_meta"]))["cases"]}, arrays


def cases(name: str, **params: Any) -> list[int]:
    found = load(name)[0].values()
    return [c["id"] for c in found if all(c["params"].get(key) == value for key, value in params.items())]


class Case:
    """One stored case: ``case.i("name")`` an input, ``case.e("name")`` an expectation."""

    def __init__(self, name: str, number: int) -> None:
        stored, self.arrays = load(name)
        self.number, self.params, self.tags = number, stored[number]["params"], stored[number]["tags"]
        self.inputs, self.expected = stored[number]["inputs"], stored[number]["expected"]

    def i(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[f"{self.number:03d}.i.{name}"])

    def e(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[f"{self.number:03d}.e.{name}"])

    @property
    def single(self) -> bool:
        return self.params.get("dtype") == "float32"


def close(got: Tensor | float, wanted: Tensor | float, atol: float, rtol: float) -> None:
    got, wanted = torch.as_tensor(got).double(), torch.as_tensor(wanted).double()
    torch.testing.assert_close(got, wanted.reshape(got.shape), atol=atol, rtol=rtol)


@pytest.mark.parametrize("number", cases("jsd_dense"))
def test_generalized_jsd_equals_trl_and_opsd_after_rescaling_to_valid_tokens(number: int) -> None:
    case = Case("jsd_dense", number)
    p = case.params
    student = case.i("student_logits").requires_grad_()
    labels = case.i("labels") if "labels" in case.inputs else None
    kwargs = {"beta": p["beta"], "temperature": p["temperature"], "top_k": p["top_k"], "token_clip": p["token_clip"]}
    kwargs["logits_are_probs"] = p.get("logits_are_probs", False)
    loss = generalized_jsd_loss(student, case.i("teacher_logits"), labels, reduction=p["reduction"], **kwargs)
    batch, length, vocab = student.shape
    # upstream divides batchmean without labels by B, and mean by B*T*V
    tokens = batch * length if labels is None else int((labels != -100).sum())
    upstream = {"batchmean": batch if labels is None else tokens, "mean": tokens * vocab}[p["reduction"]]
    scale = upstream / tokens
    atol, rtol = (4e-6, 4e-6) if case.single else (1e-7, 1e-7) if "logits_are_probs" in p else (1e-13, 1e-10)
    if math.isfinite(float(case.e("value"))):
        close(loss.detach(), case.e("value") * scale, atol, rtol)
    if "grad_student" in case.expected:
        loss.backward()
        close(student.grad, case.e("grad_student") * scale, atol, rtol)
    if "per_token_exact" in case.expected:
        per_token = generalized_jsd_loss(student.detach(), case.i("teacher_logits"), None, reduction="none", **kwargs)
        close(per_token, case.e("per_token_exact"), atol, rtol)


@pytest.mark.parametrize("number", cases("taid"))
def test_taid_equals_upstream_or_the_exact_value_where_upstream_is_nan(number: int) -> None:
    case = Case("taid", number)
    student = case.i("student_logits").requires_grad_()
    mask = case.i("mask").bool()
    loss, metrics = taid_loss(student, case.i("teacher_logits"), mask, t=case.params["t"], return_metrics=True)
    close(loss.detach(), case.e("exact64"), 2e-6, 2e-6 if case.single else 1e-7)
    if "kl_exact64" in case.expected:
        close(metrics["kl"], case.e("kl_exact64"), 2e-6, 2e-6)
    if "grad_student" in case.expected and "upstream_nan" not in case.tags:
        loss.backward()
        close(student.grad, case.e("grad_student"), 2e-7, 1e-5)


@pytest.mark.parametrize("number", cases("kdloss"))
def test_kd_loss_equals_openrlhf_and_reports_the_kl_beside_it(number: int) -> None:
    case = Case("kdloss", number)
    student = case.i("student_logits").requires_grad_()
    loss, metrics = KDLoss()(student, case.i("teacher_logits"), case.i("labels"), return_metrics=True)
    loss.backward()
    if "all_masked" in case.tags:
        assert loss.item() == 0.0
        assert not student.grad.any()
        return
    close(loss.detach(), case.e("value"), 2e-6, 2e-6)
    close(student.grad, case.e("grad_student"), 2e-7, 1e-6)
    close(metrics["kl"], case.e("kl_value"), 4e-6, 4e-6)


@pytest.mark.parametrize("number", cases("entropy_aware"))
def test_entropy_aware_equals_the_source_and_the_papers_gate(number: int) -> None:
    case = Case("entropy_aware", number)
    p = case.params
    student = case.i("student_logits").requires_grad_()
    teacher = case.i("teacher_logits")
    tol = (2e-5, 4e-6) if case.single else (1e-12, 1e-10)
    loss = entropy_aware_opd_loss(
        student, teacher, h_max=p["h_max"], temperature=p["temperature"], reduction=p["reduction"]
    )
    if p["reduction"] in ("mean", "batchmean"):
        close(loss.detach(), case.e("token_mean_valid"), *tol)
    elif p["reduction"] == "none":
        close(loss.detach(), case.e("per_token_seed"), *tol)
    else:
        close(loss.detach(), case.e("per_token_seed").sum(), *tol)
    close(teacher_entropy(teacher), case.e("teacher_entropy_T1"), *tol)
    teacher_logp, student_logp = log_softmax(teacher.double()), log_softmax(student.detach().double())
    close(divergence(teacher_logp, student_logp, 0.0), case.e("kl_fwd"), 1e-10, 1e-8)
    close(divergence(teacher_logp, student_logp, 1.0), case.e("kl_rev"), 1e-10, 1e-8)
    close(forward_kl_on_top(teacher_logp, student_logp, p["paper_k"]), case.e("paper_fkl_topk"), 1e-10, 1e-8)
    # the expectation over y ~ S of the sampled-token term's gradient is that of the stored reverse KL
    gate = teacher_entropy(teacher.double()) >= p["paper_tau"]
    paper = case.e("kl_rev") + p["paper_alpha"] * gate * case.e("paper_fkl_topk")
    close(paper, case.e("paper_per_token"), 1e-10, 1e-8)
    leaf = student.detach().double().requires_grad_()
    expected = _expected_gradient(leaf, teacher.double(), p)
    exact = divergence(teacher_logp, log_softmax(leaf), 1.0)
    exact = exact + p["paper_alpha"] * gate * forward_kl_on_top(teacher_logp, log_softmax(leaf), p["paper_k"])
    (wanted,) = torch.autograd.grad(exact.mean(), leaf)
    close(expected, wanted, 1e-10, 1e-8)


def _expected_gradient(student: Tensor, teacher: Tensor, p: dict[str, Any]) -> Tensor:
    probabilities = torch.softmax(student.detach(), -1)
    total = torch.zeros_like(student)
    for y in range(student.shape[-1]):
        ids = torch.full(student.shape[:-1], y)
        loss = eopd_loss(student, teacher, sampled_ids=ids, tau=p["paper_tau"], alpha=p["paper_alpha"], k=p["paper_k"])
        (gradient,) = torch.autograd.grad(loss, student)
        total += probabilities[..., y, None] * gradient
    return total


@pytest.mark.parametrize("number", cases("pg_is", kind="is"))
def test_importance_sampling_and_ppo_equal_tinker_trl_and_verl(number: int) -> None:
    case = Case("pg_is", number)
    new = case.i("logp_new").requires_grad_()
    behavior, adv, mask = case.i("logp_behavior"), case.i("advantages"), case.i("mask").bool()

    def check(loss: Tensor, value: str, gradient: str) -> None:
        close(loss.detach(), case.e(value), 1e-14, 1e-14)
        close(torch.autograd.grad(loss, new)[0], case.e(gradient), 1e-14, 1e-14)

    # Tinker sums over every token; its stored case has no mask of its own
    everything = None if not torch.equal(case.e("tinker_is_grad") != 0, mask) else mask
    plain = importance_sampling_loss(new, behavior, adv, everything, reduction="sum")
    check(plain, "tinker_is_sum", "tinker_is_grad")
    capped = importance_sampling_loss(new, behavior, adv, mask, cap=case.params["cap"])
    check(capped, "truncated_detached_mean", "truncated_detached_grad")
    clipped = ppo_clip_loss(new, behavior, adv, mask, clip=case.params["clip_ratio"], dual_clip=3.0)
    check(clipped, "ppo_vanilla_mean", "ppo_vanilla_grad")
    clamped = case.e("clamp_in_graph_grad")
    if (case.e("ratio")[mask] > case.params["cap"]).any():
        (ours,) = torch.autograd.grad(importance_sampling_loss(new, behavior, adv, mask, cap=2.0), new)
        assert not torch.allclose(ours, clamped)


@pytest.mark.parametrize("number", cases("pg_is", kind="opsd_thinking_machines"))
def test_reinforce_on_scalar_advantages_equals_opsd(number: int) -> None:
    case = Case("pg_is", number)
    student = case.i("student_logits").requires_grad_()
    ids, mask = case.i("ids"), case.i("labels") != -100
    temperature = case.params["temperature"]
    logp = torch.log_softmax(student / temperature, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    teacher = torch.log_softmax(case.i("teacher_logits") / temperature, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    advantage = teacher - logp.detach()
    close(advantage, case.e("advantage"), 1e-13, 1e-13)
    loss = reinforce_loss(logp, advantage, mask)
    loss.backward()
    close(loss.detach(), case.e("loss"), 1e-13, 1e-12)
    close(student.grad, case.e("grad_student"), 1e-13, 1e-12)


@pytest.mark.parametrize("number", cases("pg_is", kind="cookbook_topk_reverse_kl"))
def test_reverse_kl_renormalised_on_the_list_equals_the_cookbook(number: int) -> None:
    case = Case("pg_is", number)
    teacher, logp = case.i("teacher_renorm_probs"), case.i("student_logprobs_at_k").requires_grad_()
    per_row = divergence(teacher.log(), log_softmax(logp.masked_fill(teacher == 0, -math.inf)), 1.0)
    close(per_row.sum().detach(), case.e("loss"), 1e-13, 1e-13)
    close(torch.autograd.grad(per_row.sum(), logp)[0], case.e("grad_student_logprobs"), 1e-13, 1e-13)


def shared(case: Case, ids: Tensor) -> tuple[SparseTeacher, Tensor]:
    """The teacher's float32 logprobs at the ids, as rows without a realised token."""
    logp = torch.log_softmax(case.i("teacher_logits"), -1).gather(-1, ids).flatten(0, 1)
    order = logp.argsort(-1, descending=True)
    logp = logp.gather(-1, order)
    n = logp.shape[0]
    rows = SparseTeacher(
        ids.flatten(0, 1).gather(-1, order),
        logp,
        log_tail_torch(logp),
        torch.full((n,), -1),
        torch.full((n,), math.nan),
    )
    return rows, case.i("student_logits").requires_grad_()


@pytest.mark.parametrize("number", cases("topk_shared_support"))
def test_sparse_divergences_equal_trl_and_sdpo_on_a_shared_support(number: int) -> None:
    case = Case("topk_shared_support", number)
    beta = float(case.params["beta"])
    rows, student = shared(case, case.i("teacher_topk_ids"))
    tail = sparse_divergence_loss(student, rows, beta=beta, reduction="none")
    renormalised = sparse_divergence_loss(student, rows, beta=beta, tail="renormalise", reduction="none")
    # upstream takes 1 - sum_k s_k in float32, wrong by up to 0.3 % where the student's tail is 2e-5: repeated as it
    # does, on the stored inputs, and held against ours more loosely
    listed = case.i("teacher_topk_logprobs")
    given = torch.log_softmax(student, -1).gather(-1, case.i("teacher_topk_ids"))
    close(given.detach(), case.i("student_at_teacher_ids"), 1e-6, 1e-6)
    as_upstream = divergence(
        append_tail(listed, log_tail_torch(listed)), append_tail(given, log_tail_torch(given)), beta
    )
    close(as_upstream.detach(), case.e("tail"), 5e-5, 5e-4)  # another CPU rounds the cancelled tail otherwise
    close(torch.autograd.grad(as_upstream.sum(), student)[0], case.e("grad_tail_sum_student_logits"), 5e-5, 2e-2)
    close(tail.detach(), case.e("tail"), 5e-5, 5e-4)
    close(renormalised.detach(), case.e("renorm"), 5e-5, 5e-5)
    assert (tail.detach() <= case.e("dense") + 1e-6).all()
    close(tail.detach().mean(), case.e("sdpo_token_mean_tail"), 5e-5, 5e-4)
    close(renormalised.detach().mean(), case.e("sdpo_token_mean_renorm"), 5e-5, 5e-5)
    close(torch.autograd.grad(tail.sum(), student)[0], case.e("grad_tail_sum_student_logits"), 5e-5, 2e-2)
    dense = generalized_jsd_loss(student.double(), case.i("teacher_logits").double(), beta=beta, reduction="none")
    close(dense.detach(), case.e("dense"), 1e-10, 1e-8)
    kwargs = {"beta": beta, "top_k": case.params["K"], "reduction": "none"}
    for kind, wanted in (("bucket", tail), ("renormalise", renormalised)):
        ours = generalized_jsd_loss(student, case.i("teacher_logits"), tail=kind, **kwargs)
        close(ours.detach(), wanted.detach(), 5e-5, 2e-3)
    on_student, student = shared(case, case.i("student_logits").topk(case.params["K"]).indices)
    for kind, name in (("bucket", "student_topk_support_tail"), ("renormalise", "student_topk_support_renorm")):
        ours = sparse_divergence_loss(student, on_student, beta=beta, tail=kind, reduction="none")
        close(ours.detach(), case.e(name), 5e-5, 2e-3)


@pytest.mark.parametrize("number", cases("sdpo_losses", kind="claas_compute_sdpo_loss"))
def test_the_renormalised_divergence_with_truncated_ratios_equals_claas(number: int) -> None:
    case = Case("sdpo_losses", number)
    p, mask = case.params, case.i("response_mask").bool()
    student = case.i("student_logits").requires_grad_()
    logp = case.i("teacher_logprobs")
    order = logp.argsort(-1, descending=True)
    n = mask.numel()
    rows = SparseTeacher(
        case.i("teacher_indices").gather(-1, order).flatten(0, 1),
        logp.gather(-1, order).flatten(0, 1),
        log_tail_torch(logp).flatten(),
        torch.full((n,), -1),
        torch.full((n,), math.nan),
    )
    chosen = torch.log_softmax(student.detach(), -1).gather(-1, case.i("response_ids").unsqueeze(-1)).squeeze(-1)
    ratio = importance_ratio(chosen, case.i("old_student_logprobs"))
    close(ratio[mask].mean(), case.e("mean_is_ratio"), 1e-5, 1e-5)
    loss = sparse_divergence_loss(
        student, rows, mask, beta=p["alpha"], tail="renormalise", row_weight=ratio.clamp(max=p["is_clip"])
    )
    if any("upstream_clamp_1e-8" in tag for tag in case.tags):
        # upstream does not renormalise a student mass below 1e-8; one id renormalised is one, on both sides
        assert abs(loss.item()) < 1e-6 < case.e("distill_loss").item()
        return
    close(loss.detach(), case.e("distill_loss"), 1e-6, 1e-5)
    if p["kl_reg_weight"] == 0.0:
        loss.backward()
        close(student.grad, case.e("grad_student"), 1e-6, 1e-4)


@pytest.mark.parametrize("number", cases("sdpo_losses", kind="official_sampled_token"))
def test_reinforce_on_scalar_advantages_equals_sdpos_sampled_token_loss(number: int) -> None:
    case = Case("sdpo_losses", number)
    student, ids = case.i("student_logits").requires_grad_(), case.i("response_ids").unsqueeze(-1)
    logp = torch.log_softmax(student, -1).gather(-1, ids).squeeze(-1)
    teacher = torch.log_softmax(case.i("teacher_logits"), -1).gather(-1, ids).squeeze(-1)
    loss = reinforce_loss(logp, teacher - logp, case.i("response_mask").bool())
    loss.backward()
    close(loss.detach(), case.e("loss"), 1e-5, 1e-5)
    close(student.grad, case.e("grad_student"), 1e-5, 1e-5)


@pytest.mark.parametrize("number", cases("gjs_advantage"))
def test_the_estimators_advantage_is_the_stored_one_for_every_token(number: int) -> None:
    case = Case("gjs_advantage", number)
    student_logp = torch.log_softmax(case.i("student_logits"), -1)
    teacher_logp = case.i("teacher_logprobs")
    ours = advantage(teacher_logp - student_logp, float(case.params["beta"]))
    close(ours, case.e("advantage_all_tokens"), 1e-12, 1e-10)
    value = divergence(teacher_logp, student_logp, float(case.params["beta"]))
    close(value, case.e("divergence"), 1e-12, 1e-10)


SCHEDULES = json.loads((GOLDEN / "taid_schedule.json").read_text())["cases"]


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["name"])
def test_the_taid_schedule_repeats_upstreams_trace_but_for_the_rulings(case: dict[str, Any]) -> None:
    schedule = TAIDScheduler(case["num_train_steps"], **case["kwargs"])
    for loss, step, wanted in zip(case["losses"], case["steps"], case["trace"], strict=True):
        before = schedule.t
        delta = schedule.update_t(float(loss), step)
        if not math.isfinite(float(loss)):
            assert schedule.t == before  # ruling: upstream would re-seed, here the step is left out
            continue
        if "inf_loss" in case["name"]:
            assert before <= schedule.t <= 1.0
            continue
        assert schedule.t == pytest.approx(wanted["t"], abs=1e-7)
        assert schedule.prev_loss == pytest.approx(wanted["prev_loss"], rel=1e-6)
        if "division by 1e-15" in case["tags"]:
            continue  # ruling: the relative change against a zero loss is bounded
        assert schedule.momentum == pytest.approx(wanted["momentum"], rel=2e-5, abs=1e-8)
        assert (delta is None) == (wanted["delta"] is None)
        if delta is not None:
            assert delta == pytest.approx(wanted["delta"], rel=1e-5, abs=1e-9)
