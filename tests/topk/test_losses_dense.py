"""Divergences and distillation losses: the invariants of the maths, gradients, masks, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from topkd.topk import gjs, shared_support_gjs
from topkd.topk.errors import ConfigError
from topkd.topk.losses import (
    KDLoss,
    SparseTeacher,
    entropy_aware_opd_loss,
    eopd_loss,
    generalized_jsd_loss,
    sparse_divergence_loss,
    taid_loss,
    teacher_entropy,
)
from topkd.topk.losses.divergence import divergence, divergence_terms, log_tail

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
seeds = st.integers(0, 10**6)
inner = st.floats(0.02, 0.98)
pairs = settings(max_examples=40, deadline=None)


def pair(seed: int, shape: tuple[int, ...] = (2, 3, 7), scale: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    both = scale * torch.randn(2, *shape, generator=g, dtype=torch.float64)
    return both[0].clone().requires_grad_(), both[1].clone()


def h2(beta: float) -> float:
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def slow(teacher: Tensor, student: Tensor, beta: float) -> float:
    """One position from its probabilities, term by term in Python floats."""
    t, s = torch.softmax(teacher, -1).tolist(), torch.softmax(student, -1).tolist()

    def kl(p: list[float], q: list[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0.0 else kl(s, t)
    m = [beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True)]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def jsd(student: Tensor, teacher: Tensor, beta: float, **kwargs: object) -> Tensor:
    return generalized_jsd_loss(student, teacher, beta=beta, **kwargs)


def teacher_rows(teacher: Tensor, k: int) -> SparseTeacher:
    logp = torch.log_softmax(teacher.double(), -1).reshape(-1, teacher.shape[-1])
    top, ids = logp.topk(k)
    n = ids.shape[0]
    return SparseTeacher(ids, top, log_tail(top), torch.full((n,), -1), torch.full((n,), math.nan).double())


LOSSES = {
    **{f"jsd {beta}": (lambda s, t, m, beta=beta, **kw: jsd(s, t, beta, labels=m, **kw)) for beta in BETAS},
    "jsd top_k": lambda s, t, m, **kw: jsd(s, t, 0.5, labels=m, top_k=3, **kw),
    "jsd top_k bucket": lambda s, t, m, **kw: jsd(s, t, 0.0, labels=m, top_k=3, tail="bucket", **kw),
    "jsd token_clip": lambda s, t, m, **kw: jsd(s, t, 0.0, labels=m, token_clip=0.05, **kw),
    "jsd tempered": lambda s, t, m, **kw: jsd(s, t, 0.3, labels=m, temperature=2.5, **kw),
    **{f"taid {t}": (lambda s, z, m, t=t, **kw: taid_loss(s, z, m, t=t, **kw)) for t in (0.0, 1.0)},
    "kd": KDLoss(),
    "entropy aware": lambda s, t, m, **kw: entropy_aware_opd_loss(s, t, labels=m, **kw),
    **{
        f"sparse {tail} {beta}": (
            lambda s, t, m, tail=tail, beta=beta, **kw: sparse_divergence_loss(
                s, teacher_rows(t.nan_to_num(), 3), m, beta=beta, tail=tail, **kw
            )
        )
        for tail in ("bucket", "renormalise")
        for beta in (0.0, 0.5, 1.0)
    },
}
MOVING = {
    "taid": lambda s, t, m, **kw: taid_loss(s, t, m, t=0.4, **kw),
    "eopd": lambda s, t, m, **kw: eopd_loss(s, t, mask=m, sampled_ids=torch.zeros(s.shape[:-1]).long(), **kw),
}
EVERY = {**LOSSES, **MOVING}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (3, 4, 17), (2, 1, 129)])
def test_the_loss_is_the_mean_of_the_slow_divergence(beta: float, shape: tuple[int, ...]) -> None:
    student, teacher = pair(1, shape)
    rows = zip(teacher.reshape(-1, shape[-1]), student.reshape(-1, shape[-1]), strict=True)
    wanted = np.mean([slow(t, s, beta) for t, s in rows])
    assert jsd(student, teacher, beta).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_numpy_and_torch_give_the_same_divergence(beta: float) -> None:
    student, teacher = (torch.log_softmax(x.detach(), -1) for x in pair(2))
    twin = gjs(teacher.numpy(), student.numpy(), beta)
    np.testing.assert_allclose(divergence(teacher, student, beta).numpy(), twin, rtol=1e-10, atol=1e-13)
    ids = teacher.topk(3).indices
    t, s = teacher.gather(-1, ids), student.gather(-1, ids)
    for tail in ("bucket", "renormalise"):
        ours = sparse_divergence_loss(student, teacher_rows(teacher, 3), beta=beta, tail=tail, reduction="none")
        twin = shared_support_gjs(t.numpy(), s.numpy(), beta, tail=tail)
        np.testing.assert_allclose(ours.numpy(), twin, rtol=1e-8, atol=1e-12)


@pairs
@given(seeds, inner)
def test_gjs_lies_between_zero_and_the_binary_entropy(seed: int, beta: float) -> None:
    student, teacher = pair(seed, scale=6.0)
    value = jsd(student, teacher, beta, reduction="none")
    assert (value >= 0).all()
    assert (value <= h2(beta) + 1e-9).all()
    terms = divergence_terms(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1), beta)
    assert (terms >= -1e-12).all()


@pairs
@given(seeds, st.sampled_from(BETAS))
def test_identical_sides_give_zero_and_different_ones_do_not(seed: int, beta: float) -> None:
    student, teacher = pair(seed)
    assert jsd(student, student.detach() + 3.0, beta).item() == pytest.approx(0.0, abs=1e-12)
    assert (jsd(student, teacher, beta, reduction="none") > 1e-6).all()


@pairs
@given(seeds, inner | st.sampled_from([0.0, 1.0]))
def test_swapping_the_sides_swaps_the_weight(seed: int, beta: float) -> None:
    student, teacher = pair(seed)
    swapped = jsd(teacher, student.detach(), 1 - beta)
    assert jsd(student, teacher, beta).item() == pytest.approx(swapped.item(), rel=1e-9, abs=1e-12)


@pairs
@given(seeds, st.sampled_from(BETAS), st.floats(0.3, 4))
def test_order_shift_and_temperature_do_what_they_must(seed: int, beta: float, temperature: float) -> None:
    student, teacher = pair(seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    value = jsd(student, teacher, beta, temperature=temperature).item()
    assert jsd(student[..., order], teacher[..., order], beta, temperature=temperature).item() == pytest.approx(value)
    assert jsd(student + 5.0, teacher - 3.0, beta, temperature=temperature).item() == pytest.approx(value)
    assert jsd(student / temperature, teacher / temperature, beta).item() == pytest.approx(value)
    assert jsd(student, teacher, beta, temperature=1e6).item() == pytest.approx(0.0, abs=1e-9)


@pairs
@given(seeds, st.sampled_from(BETAS))
def test_the_tail_divergence_grows_with_k_up_to_the_dense_one(seed: int, beta: float) -> None:
    student, teacher = pair(seed, (4, 9))
    dense = jsd(student, teacher, beta, reduction="none")
    last = torch.zeros_like(dense)
    for k in range(1, 9):
        bucket = sparse_divergence_loss(student, teacher_rows(teacher, k), beta=beta, reduction="none")
        assert (bucket >= last - 1e-7).all()
        assert (bucket <= dense + 1e-7).all()
        same = jsd(student, teacher, beta, top_k=k, tail="bucket", reduction="none")
        torch.testing.assert_close(bucket, same, atol=1e-7, rtol=1e-6)
        last = bucket
    torch.testing.assert_close(jsd(student, teacher, beta, top_k=99, tail="bucket", reduction="none"), dense)
    torch.testing.assert_close(jsd(student, teacher, beta, top_k=9, reduction="none"), dense)


def test_disjoint_supports_give_the_binary_entropy_with_finite_gradients() -> None:
    inf = math.inf
    student = torch.tensor([[0.0, 1.0, -inf, -inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-inf, -inf, 2.0, 0.0]], dtype=torch.float64)
    for beta in (0.2, 0.5, 0.7):
        loss = jsd(student, teacher, beta)
        assert loss.item() == pytest.approx(h2(beta))
        assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    for beta in (0.0, 1.0):
        assert jsd(student, teacher, beta).item() == inf


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_the_closed_form_and_sums_to_zero(beta: float) -> None:
    student, teacher = pair(3, (5, 8))
    (gradient,) = torch.autograd.grad(jsd(student, teacher, beta, reduction="sum"), student)
    s, t = torch.softmax(student.detach(), -1), torch.softmax(teacher, -1)
    if beta == 0.0:
        wanted = s - t
    else:
        ratio = torch.log(s / (t if beta == 1.0 else beta * t + (1 - beta) * s))
        wanted = (1.0 if beta == 1.0 else 1 - beta) * s * (ratio - (s * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, wanted, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_finite_differences_agree_with_every_loss(name: str) -> None:
    student, teacher = pair(4, (2, 2, 6), scale=1.0)
    mask = torch.tensor([[True, False], [True, True]])
    if name == "taid 0.0":
        (gradient,) = torch.autograd.grad(taid_loss(student, teacher, mask, t=0.0), student)
        assert gradient.abs().max() < 1e-15  # the target moves with the student: no finite difference sees this
        return
    assert gradcheck(lambda s: LOSSES[name](s, teacher, mask), (student,))


def test_finite_differences_agree_where_the_target_is_held() -> None:
    student, teacher = pair(5, (3, 6), scale=1.0)
    fixed = student.detach().clone()
    p = torch.softmax(0.6 * fixed + 0.4 * teacher, -1)
    (gradient,) = torch.autograd.grad(taid_loss(student, teacher, t=0.4), student)
    torch.testing.assert_close(gradient, (torch.softmax(fixed, -1) - p) / 3, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_masked_positions_change_nothing_whatever_they_hold(name: str) -> None:
    student, teacher = pair(6, (3, 4, 6))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = mask[2, 0] = False
    clean = EVERY[name](student, teacher, mask)
    (wanted,) = torch.autograd.grad(clean, student)
    dirty_s, dirty_t = student.detach().clone(), teacher.clone()
    dirty_s[1, 2], dirty_s[1, 3], dirty_s[2, 0] = math.nan, -math.inf, math.inf
    dirty_t[1, 2], dirty_t[1, 3], dirty_t[2, 0] = math.inf, math.nan, -math.inf
    dirty_s.requires_grad_()
    loss = EVERY[name](dirty_s, dirty_t, mask)
    (gradient,) = torch.autograd.grad(loss, dirty_s)
    assert loss.item() == clean.item()
    torch.testing.assert_close(gradient, wanted, atol=0, rtol=0)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("name", sorted(EVERY))
def test_an_all_true_mask_is_no_mask_and_samples_may_change_places(name: str) -> None:
    student, teacher = pair(7, (4, 2, 6))
    full = EVERY[name](student, teacher, torch.ones(4, 2, dtype=torch.bool)).item()
    assert full == EVERY[name](student, teacher, None).item()
    order = torch.tensor([2, 0, 3, 1])
    assert EVERY[name](student[order], teacher[order], None).item() == pytest.approx(full, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_nothing_valid_is_zero_with_a_graph(name: str) -> None:
    student, teacher = pair(8, (2, 3, 6))
    loss = EVERY[name](student, teacher * math.nan, torch.zeros(2, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("name", sorted(EVERY))
def test_the_teacher_receives_no_gradient_and_accumulation_adds_up(name: str) -> None:
    student, teacher = pair(9, (3, 2, 6))
    teacher.requires_grad_()
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    whole = EVERY[name](student, teacher, mask)
    parts = sum(EVERY[name](student[i], teacher[i], mask[i], num_tokens=4) for i in range(3))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12, abs=1e-15)
    whole.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", sorted(EVERY))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype) for x in pair(10, (3, 4, 6), scale=1.0))
    exact = EVERY[name](student.double(), teacher.double(), None).item()
    loss = EVERY[name](student, teacher, None)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_reductions_are_over_valid_tokens(reduction: str) -> None:
    student, teacher = pair(11, (2, 3, 6))
    labels = torch.tensor([[5, -100, 2], [-100, -100, 7]])
    per_token = jsd(student, teacher, 0.5, labels=labels, reduction="none")
    assert (per_token[labels == -100] == 0).all()
    wanted = {"none": per_token, "sum": per_token.sum()}.get(reduction, per_token.sum() / 3)
    torch.testing.assert_close(jsd(student, teacher, 0.5, labels=labels, reduction=reduction), wanted)


def test_probabilities_in_give_the_same_loss_as_their_logits() -> None:
    student, teacher = pair(12)
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    assert jsd(p, q, 0.3, logits_are_probs=True).item() == pytest.approx(jsd(student, teacher, 0.3).item())
    zero = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = jsd(zero, torch.tensor([[0.5, 0.5]], dtype=torch.float64), 0.5, logits_are_probs=True)
    assert torch.isfinite(torch.autograd.grad(loss, zero)[0]).all()


def test_entropy_aware_is_forward_kl_where_w_is_one_and_reverse_where_it_is_zero() -> None:
    student, teacher = pair(13, (4, 6))
    assert entropy_aware_opd_loss(student, teacher, h_max=1e-9).item() == pytest.approx(
        jsd(student, teacher, 0.0).item()
    )
    sharp = torch.full((4, 6), -math.inf, dtype=torch.float64)
    sharp[:, 2] = 0.0
    floored = student.detach().clone()
    floored[:, [0, 1, 3, 4, 5]] = -math.inf
    assert entropy_aware_opd_loss(floored, sharp).item() == 0.0
    assert entropy_aware_opd_loss(student, teacher, h_max=1e9).item() == pytest.approx(
        jsd(student, teacher, 1.0).item(), rel=1e-6
    )
    assert entropy_aware_opd_loss(student, student.detach()).item() == pytest.approx(0.0, abs=1e-12)
    assert entropy_aware_opd_loss(student, torch.zeros_like(student)).item() == pytest.approx(
        jsd(student, torch.zeros_like(student), 0.0).item()
    )


def test_the_gate_of_entropy_aware_sees_the_tempered_teacher() -> None:
    student, teacher = pair(14, (5, 6))
    cold = entropy_aware_opd_loss(student, teacher, temperature=0.5)
    assert cold.item() == pytest.approx(entropy_aware_opd_loss(student / 0.5, teacher / 0.5).item())


def test_teacher_entropy_is_that_of_the_distribution() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf]])
    torch.testing.assert_close(teacher_entropy(logits), torch.tensor([math.log(2), 0.0]))


def test_eopd_adds_forward_kl_only_at_or_above_tau_and_averages_over_all() -> None:
    student, teacher = pair(15, (6, 8))
    entropies = teacher_entropy(teacher)
    tau = entropies.median().item()
    ids = torch.randint(0, 8, (6,), generator=torch.Generator().manual_seed(0))
    never = eopd_loss(student, teacher, sampled_ids=ids, tau=1e9)
    loss, metrics = eopd_loss(student, teacher, sampled_ids=ids, tau=tau, alpha=0.7, k=3, return_metrics=True)
    top, at = torch.log_softmax(teacher, -1).topk(3)
    forward = divergence(torch.log_softmax(top, -1), torch.log_softmax(student, -1).gather(-1, at), 0.0)
    gate = entropies >= tau
    assert (loss - never).item() == pytest.approx((0.7 * forward * gate).sum().item() / 6)
    assert metrics["gate_fraction"] == pytest.approx(gate.double().mean().item())


def test_eopds_sampled_term_is_reverse_kls_policy_gradient_off_policy_too() -> None:
    student, teacher = pair(16, (1, 5))
    other = torch.log_softmax(pair(17, (1, 5))[0].detach(), -1)
    total = torch.zeros_like(student)
    for y in range(5):
        ids = torch.tensor([y])
        loss = eopd_loss(student, teacher, sampled_ids=ids, tau=1e9, behavior_logp=other[:, y])
        total += other[0, y].exp() * torch.autograd.grad(loss, student)[0]
    (wanted,) = torch.autograd.grad(jsd(student, teacher, 1.0), student)
    torch.testing.assert_close(total, wanted, atol=1e-12, rtol=1e-10)


def test_eopd_leaves_out_and_counts_tokens_the_teacher_rules_out() -> None:
    student, teacher = pair(18, (3, 5))
    teacher[:, 4] = -math.inf
    ids = torch.tensor([4, 4, 0])
    loss, metrics = eopd_loss(student, teacher, sampled_ids=ids, return_metrics=True)
    assert math.isfinite(loss.item())
    assert metrics["excluded"] == 2


@pairs
@given(seeds, st.floats(0, 1))
def test_taids_value_is_the_targets_entropy_when_both_agree_and_its_kl_is_zero(seed: int, t: float) -> None:
    student, _ = pair(seed)
    loss, metrics = taid_loss(student, student.detach(), t=t, return_metrics=True)
    assert loss.item() == pytest.approx(teacher_entropy(student.detach()).mean().item())
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-12)


@pairs
@given(seeds)
def test_kd_minus_the_teachers_entropy_is_forward_kl(seed: int) -> None:
    student, teacher = pair(seed)
    loss, metrics = KDLoss()(student, teacher, None, return_metrics=True)
    forward = jsd(student, teacher, 0.0).item()
    assert metrics["kl"] == pytest.approx(forward, abs=1e-10)
    assert loss.item() - teacher_entropy(teacher).mean().item() == pytest.approx(forward, abs=1e-10)
    assert taid_loss(student, teacher, t=1.0).item() == pytest.approx(loss.item())


def test_per_row_weights_multiply_and_never_learn() -> None:
    student, teacher = pair(19, (4, 6))
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rows = teacher_rows(teacher, 3)
    each = sparse_divergence_loss(student, rows, reduction="none")
    loss = sparse_divergence_loss(student, rows, row_weight=weight)
    loss.backward()
    assert loss.item() == pytest.approx((weight * each).mean().item())
    assert weight.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.5}, "beta must lie"),
        ({"beta": math.nan}, "beta must lie"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"tail": "floor", "top_k": 2}, "unknown tail"),
        ({"token_clip": -1.0}, "token_clip must be positive"),
        ({"reduction": "median"}, "unknown reduction"),
        ({"logits_are_probs": True}, "not probabilities"),
        ({"logits_are_probs": True, "temperature": 2.0}, "neither a temperature nor top_k"),
        ({"logits_are_probs": True, "top_k": 2}, "neither a temperature nor top_k"),
        ({"labels": torch.tensor([[0, 1, 1], [1, 0, 1]])}, "only 0 and 1"),
        ({"labels": torch.tensor([[5, -1, 1], [1, 0, 1]])}, "negative but not -100"),
        ({"labels": torch.ones(2, 3)}, "labels must be integers"),
        ({"labels": torch.ones(2, 4, dtype=torch.long)}, "another shape"),
        ({"teacher_logits": torch.zeros(2, 3, 9)}, "differ in shape"),
        ({"num_tokens": 4, "reduction": "sum"}, "num_tokens has no meaning"),
        ({"student_logits": torch.zeros(2, 3, 7, dtype=torch.long)}, "floating-point"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(change: dict[str, object], message: str) -> None:
    student, teacher = pair(20)
    with pytest.raises(ConfigError, match=message):
        generalized_jsd_loss(**({"student_logits": student, "teacher_logits": teacher} | change))


def test_options_of_the_other_losses_are_refused_when_wrong() -> None:
    student, teacher = pair(21, (2, 5))
    with pytest.raises(ConfigError, match="t must lie"):
        taid_loss(student, teacher, t=1.2)
    with pytest.raises(ConfigError, match="h_max must be positive"):
        entropy_aware_opd_loss(student, teacher, h_max=0.0)
    with pytest.raises(ConfigError, match="top_k must be at least 1"):
        eopd_loss(student, teacher, sampled_ids=torch.zeros(2).long(), k=0)
    with pytest.raises(ConfigError, match="sampled_ids must be integers"):
        eopd_loss(student, teacher, sampled_ids=torch.zeros(3).long())
    with pytest.raises(ConfigError, match="shift=True needs"):
        KDLoss()(student, teacher, None, shift=True)
    with pytest.raises(ConfigError, match="row_weight is not finite"):
        sparse_divergence_loss(student, teacher_rows(teacher, 2), row_weight=torch.full((2,), math.nan))
