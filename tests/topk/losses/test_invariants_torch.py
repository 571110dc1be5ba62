"""The invariants I1 .. I11 of the maths on the torch losses, over random logits in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.topk.random_logits import (
    EPS,
    EXAMPLES,
    LOSSES,
    betas,
    closed_form,
    interior,
    lams,
    listed,
    names,
    pairs,
    value_and_grad,
)
from topkd.topk.losses import (
    SparseTeacher,
    fused_divergence_loss,
    fused_topk_policy_gradient_loss,
    generalized_jsd_loss,
    reinforce_loss,
    sparse_divergence_loss,
    topk_policy_gradient_loss,
)
from topkd.topk.losses.divergence import divergence, divergence_terms, log_tail_torch
from topkd.topk.losses.topk_policy import advantage


@EXAMPLES
@given(pairs(), betas, st.integers(1, 8))
def test_i01_i02_i03_values_are_bounded_and_zero_at_equality(pair: tuple[Tensor, Tensor], beta: float, k: int) -> None:
    student, teacher = pair
    bound = -sum(x * math.log(x) for x in (beta, 1 - beta) if x > 0) if 0 < beta < 1 else math.inf
    for loss in (
        lambda s: generalized_jsd_loss(s, teacher, beta=beta, reduction="none"),
        lambda s: generalized_jsd_loss(s, teacher, beta=beta, top_k=k, reduction="none"),
        lambda s: sparse_divergence_loss(s, listed(teacher, k), beta=beta, reduction="none"),
        lambda s: sparse_divergence_loss(s, listed(teacher, k), beta=beta, tail="renormalise", reduction="none"),
    ):
        value = loss(student)
        assert (value >= 0).all()
        assert (value <= bound + EPS).all()
        assert loss(teacher).max().item() <= 1e-7  # the tail's clamp at 1 - 1e-7
    assert (generalized_jsd_loss(student, teacher, beta=beta, reduction="none") > 1e-12).all()


@EXAMPLES
@given(pairs(), interior, st.integers(1, 8))
def test_i04_i05_sides_and_order(pair: tuple[Tensor, Tensor], beta: float, k: int) -> None:
    student, teacher = pair
    value = generalized_jsd_loss(student, teacher, beta=beta)
    torch.testing.assert_close(value, generalized_jsd_loss(teacher, student, beta=1 - beta), rtol=1e-9, atol=1e-12)
    order = torch.arange(student.shape[1]).roll(2)
    torch.testing.assert_close(value, generalized_jsd_loss(student[:, order], teacher[:, order], beta=beta))
    rows = listed(teacher, k)
    turned = SparseTeacher(rows.ids.flip(-1), rows.logp.flip(-1), rows.tail_logp, rows.actual_ids, rows.actual_logp)
    torch.testing.assert_close(
        sparse_divergence_loss(student, rows, beta=beta), sparse_divergence_loss(student, turned, beta=beta)
    )


@EXAMPLES
@given(pairs(), interior, st.integers(1, 8))
def test_i08_the_partial_sum_lies_between_zero_and_the_bucket(pair: tuple[Tensor, Tensor], beta: float, k: int) -> None:
    student, teacher = (torch.log_softmax(side, -1)[:, :k] for side in pair)
    partial = divergence_terms(teacher, student, beta).sum(-1)
    bins = (torch.cat([side, log_tail_torch(side)[:, None]], -1) for side in (teacher, student))
    assert (partial >= -EPS).all()
    assert (partial <= divergence(*bins, beta) + EPS).all()


@EXAMPLES
@given(pairs(), betas, lams, st.integers(1, 3), st.floats(0, 5))
def test_i09_a_repeated_id_and_a_pad_change_nothing(
    pair: tuple[Tensor, Tensor], beta: float, lam: float, k: int, lower: float
) -> None:
    """One event, listed once more with its own or a smaller logprob, before or after it; in no loss on lists."""
    student, teacher = pair
    rows = listed(teacher, k)
    pads = torch.full((3, 2), -1), torch.full((3, 2), -math.inf, dtype=torch.float64)
    again = rows.ids[:, :1], rows.logp[:, :1] - lower
    more = [
        [*pads, rows.ids, rows.logp],
        [rows.ids, rows.logp, *pads],
        [rows.ids, rows.logp, *again],
        [*again, rows.ids, rows.logp],
        [*again, rows.ids, rows.logp, rows.ids, rows.logp],
    ]
    head = torch.eye(student.shape[1], dtype=torch.float64)

    def policy_loss(logits: Tensor, given: SparseTeacher) -> Tensor:
        own = torch.log_softmax(logits, -1)
        actual = own.gather(-1, given.actual_ids[:, None])[:, 0]
        return topk_policy_gradient_loss(own.gather(-1, given.ids.clamp(min=0)), actual, given, beta=beta, lam=lam)

    for loss in (
        lambda s, given: sparse_divergence_loss(s, given, beta=beta),
        lambda s, given: sparse_divergence_loss(s, given, beta=beta, tail="renormalise"),
        lambda s, given: fused_divergence_loss(s, head, given, beta=beta),
        lambda s, given: fused_topk_policy_gradient_loss(s, head, given, beta=beta, lam=lam).loss,
        policy_loss,
    ):
        value, gradient = value_and_grad(lambda s, loss=loss: loss(s, rows), student)
        for parts in more:
            ids, logp = torch.cat(parts[::2], -1), torch.cat(parts[1::2], -1)
            wide = SparseTeacher(ids, logp, rows.tail_logp, rows.actual_ids, rows.actual_logp)
            got, slope = value_and_grad(lambda s, loss=loss, wide=wide: loss(s, wide), student)
            assert got == pytest.approx(value, rel=1e-10, abs=1e-12)
            torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-11)


@EXAMPLES
@given(pairs(), betas, st.floats(-30, 30))
def test_i10_the_gradient_is_the_formula_and_the_difference_and_sums_to_zero(
    pair: tuple[Tensor, Tensor], beta: float, shift: float
) -> None:
    student, teacher = pair[0], pair[1].clone().requires_grad_()
    value, gradient = value_and_grad(
        lambda s: generalized_jsd_loss(s, teacher, beta=beta, reduction="sum"), student + shift
    )
    torch.testing.assert_close(gradient, closed_form(student, teacher.detach(), beta), rtol=1e-7, atol=1e-9)
    assert gradient.sum(-1).abs().max().item() < EPS
    assert teacher.grad is None
    direction = torch.linspace(-1, 1, student.numel(), dtype=torch.float64).reshape(student.shape).sin()
    step = 1e-5
    ahead, behind = (
        generalized_jsd_loss(student + sign * step * direction, teacher, beta=beta, reduction="sum").item()
        for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-6)
    assert value == pytest.approx((ahead + behind) / 2, rel=1e-6, abs=1e-6)


@EXAMPLES
@given(pairs(), names)
def test_i10_no_loss_moves_the_teacher_and_every_gradient_sums_to_zero(pair: tuple[Tensor, Tensor], name: str) -> None:
    student, teacher = pair[0], pair[1].clone().requires_grad_()
    leaf = student.clone().requires_grad_()
    LOSSES[name](leaf, teacher).backward()
    assert teacher.grad is None
    assert leaf.grad.sum(-1).abs().max().item() < 1e-8


@EXAMPLES
@given(pairs(rows=1), betas)
def test_i11_the_sampled_token_advantage_has_the_divergences_gradient(pair: tuple[Tensor, Tensor], beta: float) -> None:
    student, teacher = pair
    s, lt = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    vocab = student.shape[1]
    total, constant = torch.zeros_like(student), torch.zeros_like(student)
    for y in range(vocab):
        g = advantage(lt[:, y] - s[:, y], beta)
        d = generalized_jsd_loss(student, teacher, beta=beta).reshape(1)
        for into, value in ((total, g), (constant, d)):
            _, gradient = value_and_grad(
                lambda z, y=y, a=value: reinforce_loss(torch.log_softmax(z, -1)[:, y], a), student
            )
            into.add_(s[:, y].exp() * gradient)
    exact = closed_form(student, teacher, beta)
    scale = 1 + exact.abs().max().item()
    torch.testing.assert_close(total / scale, exact / scale, rtol=0, atol=EPS)
    assert constant.abs().max().item() < EPS * scale


@EXAMPLES
@given(pairs(rows=1), betas, lams, st.integers(0, 4))
def test_i11_the_estimator_is_unbiased_for_every_k_beta_and_lambda(
    pair: tuple[Tensor, Tensor], beta: float, lam: float, k: int
) -> None:
    student, teacher = pair
    logp, vocab = torch.log_softmax(student, -1), student.shape[1]
    rows = listed(teacher, max(k, 1))
    ids = rows.ids[:, : min(k, vocab - 2)]
    got = torch.zeros_like(student)

    def at(logits: Tensor, y: int) -> Tensor:
        own, t = torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1)
        inside = t.gather(-1, ids)
        tail = torch.log1p(-inside.exp().sum(-1))
        held = SparseTeacher(ids, inside, tail, torch.tensor([y]), t[:, y])
        return topk_policy_gradient_loss(own.gather(-1, ids), own[:, y], held, beta=beta, lam=lam)

    for y in range(vocab):
        got += logp[:, y].exp() * value_and_grad(lambda z, y=y: at(z, y), student)[1]

    def wanted(logits: Tensor) -> Tensor:
        own, t = torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1)
        others = [v for v in range(vocab) if v not in ids[0].tolist()]
        bins = (torch.cat([x.gather(-1, ids), x[:, others].logsumexp(-1, keepdim=True)], -1) for x in (t, own))
        return ((1 - lam) * divergence(*bins, beta) + lam * divergence(t, own, beta)).sum()

    tails = [1 - torch.softmax(side, -1).gather(-1, ids).sum().item() for side in pair]
    if min(tails) > 1e-5:
        exact = value_and_grad(wanted, student)[1]
        scale = 1 + exact.abs().max().item()
        torch.testing.assert_close(got / scale, exact / scale, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_teacher_with_a_graph_receives_no_gradient(name: str) -> None:
    """Every loss by name, whatever the property above happens to draw."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    LOSSES[name](student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
