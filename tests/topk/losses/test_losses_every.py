"""What holds for every loss on logits: finite differences, masks, reductions, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.topk.every_loss import EVERY, LOSSES, jsd, pair, teacher_rows
from topkd.topk.losses import (
    sparse_divergence_loss,
    taid_loss,
)


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


def test_per_row_weights_multiply_and_never_learn() -> None:
    student, teacher = pair(19, (4, 6))
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rows = teacher_rows(teacher, 3)
    each = sparse_divergence_loss(student, rows, reduction="none")
    loss = sparse_divergence_loss(student, rows, row_weight=weight)
    loss.backward()
    assert loss.item() == pytest.approx((weight * each).mean().item())
    assert weight.grad is None
