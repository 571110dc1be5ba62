"""The top-K policy gradient where something is unknown, zero, empty or wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.topk.enumeration import BETAS, estimator, pair, served, sparse
from topkd.topk import topk_weights
from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.losses import SparseTeacher, topk_policy_gradient_loss


def test_holes_and_unknown_realised_tokens_are_masked_counted_and_harmless() -> None:
    logits, teacher = pair(8, rows=4)
    y = torch.tensor([0, 1, 2, 3])
    ids = teacher.topk(3).indices
    leaf = logits.clone().requires_grad_()
    rows = sparse(ids, teacher, y)
    hole = rows.logp.clone()
    hole[1] = -math.inf
    pads = ids.clone()
    pads[1] = -1
    unknown = rows.actual_logp.clone()
    unknown[2] = math.nan
    damaged = SparseTeacher(pads, hole, rows.tail_logp, y, unknown)
    logp = torch.log_softmax(leaf, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    loss, metrics = topk_policy_gradient_loss(at_ids, chosen, damaged, return_metrics=True)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    keep = torch.tensor([True, False, False, True])
    wanted = topk_policy_gradient_loss(at_ids[keep], chosen[keep], rows.rows(keep))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-13)
    assert metrics["masked_rows"] == 2
    assert not gradient[1:3].any()
    # without the sampled term the realised token is not needed: only the hole stays out
    keep = torch.tensor([True, False, True, True])
    deterministic = topk_policy_gradient_loss(at_ids, chosen, damaged, lam=0.0)
    wanted = topk_policy_gradient_loss(at_ids[keep], chosen[keep], rows.rows(keep), lam=0.0)
    assert deterministic.item() == pytest.approx(wanted.item(), rel=1e-13)


def test_masked_rows_may_hold_nan_on_every_side() -> None:
    logits, teacher = pair(9, rows=4)
    y = torch.tensor([0, 1, 2, 3])
    ids = teacher.topk(3).indices
    logp = torch.log_softmax(logits, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    clean = topk_policy_gradient_loss(at_ids[:3], chosen[:3], sparse(ids, teacher, y).rows(torch.arange(3)))
    rows = sparse(ids, teacher, y)
    at_ids[3], chosen[3], rows.logp[3], rows.tail_logp[3], rows.actual_logp[3] = [math.nan] * 5
    at_ids.requires_grad_()
    mask = torch.tensor([True, True, True, False])
    behavior = chosen.clone()
    loss = topk_policy_gradient_loss(at_ids, chosen, rows, mask, behavior_logp=behavior)
    loss.backward()
    assert loss.item() == pytest.approx(clean.item(), rel=1e-13)
    assert torch.isfinite(at_ids.grad).all()


def test_nothing_valid_is_zero_with_a_graph() -> None:
    logits, teacher = pair(10)
    y = torch.zeros(3, dtype=torch.long)
    leaf = logits.clone().requires_grad_()
    loss = estimator(leaf, teacher.topk(3).indices, teacher, y, mask=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert not leaf.grad.any()


def test_an_empty_tail_is_gated_and_counted_instead_of_dividing_roundings() -> None:
    teacher = torch.tensor([[math.log(1 - 1e-9), math.log(5e-10), math.log(5e-10)]], dtype=torch.float64)
    student = torch.tensor([[0.2, 0.7, -0.1]], dtype=torch.float64, requires_grad=True)
    ids, y = torch.tensor([[0]]), torch.tensor([2])
    logp = torch.log_softmax(student, -1)
    rows = sparse(ids, teacher, y)
    loss, metrics = topk_policy_gradient_loss(
        logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0], rows, lam=1.0, return_metrics=True
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert metrics["gated_rows"] == 1
    s, t = logp[0].exp(), teacher[0].exp()
    g = 0.5 * torch.log((0.5 * t + 0.5 * s) / s)
    onehot = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(gradient[0], (-(s[0] * g[0]) * (onehot - s)).detach())


def test_at_reverse_kl_a_realised_token_the_teacher_rules_out_is_masked_and_counted() -> None:
    logits, teacher = pair(12)
    teacher[:, 8] = -math.inf
    teacher = torch.log_softmax(teacher, -1)
    y = torch.tensor([8, 8, 1])
    leaf = logits.clone().requires_grad_()
    ids = teacher.topk(3).indices
    loss, metrics = estimator(leaf, ids, teacher, y, beta=1.0, lam=1.0, return_metrics=True)
    loss.backward()
    assert metrics["excluded_tokens"] == 2
    assert torch.isfinite(leaf.grad).all()
    below, metrics = estimator(leaf, ids, teacher, y, beta=0.9, lam=1.0, return_metrics=True)
    assert metrics["excluded_tokens"] == 0
    assert math.isfinite(below.item())


def test_a_listed_exact_zero_belongs_to_the_tail_at_reverse_kl() -> None:
    logits, teacher = pair(13)
    teacher[:, 0] = -math.inf
    teacher = torch.log_softmax(teacher, -1)
    rest = teacher.topk(3).indices
    with_zero = torch.cat([rest, torch.zeros(3, 1, dtype=torch.long)], -1)
    y = torch.tensor([5, 6, 7])
    a = estimator(logits, rest, teacher, y, beta=1.0, lam=0.5)
    b = estimator(logits, with_zero, teacher, y, beta=1.0, lam=0.5)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_an_id_the_student_excludes_has_no_nan() -> None:
    logits, teacher = pair(14)
    ids = teacher.topk(3).indices
    logits.scatter_(-1, ids[:, :1], -math.inf)
    leaf = logits.clone().requires_grad_()
    for beta in BETAS:
        leaf.grad = None
        estimator(leaf, ids, teacher, torch.tensor([ids[r, 1] for r in range(3)]), beta=beta).backward()
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("beta", BETAS)
def test_the_weight_where_the_student_has_no_probability_is_the_limit_in_numpy_and_torch(beta: float) -> None:
    """s g at s = 0: t at forward KL, where dense's gradient is s - t without exception, and 0 elsewhere."""
    logits, teacher = pair(22)
    y = [int(row[1]) for row in teacher.topk(3).indices]
    topk = served(teacher, y)
    ids = torch.tensor(topk.ids).long()
    logits.scatter_(-1, ids[:, :1], -math.inf)
    leaf = logits.clone().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, torch.tensor(y)[:, None])[:, 0]
    loss = topk_policy_gradient_loss(at_ids, chosen, topk, beta=beta, lam=0.0, reduction="sum")
    gradient, slope = torch.autograd.grad(loss, [leaf, at_ids])
    w_ids, _ = topk_weights(topk, at_ids.detach().numpy(), chosen.detach().numpy(), beta=beta, lam=0.0)
    np.testing.assert_allclose(-slope.numpy(), w_ids, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(w_ids[:, 0], np.exp(topk.logp[:, 0]) if beta == 0.0 else 0.0, rtol=1e-6)
    assert math.isfinite(loss.item())  # the surrogate leaves log 0 out; the gradient goes on where it was going:
    near = torch.where(torch.isneginf(logits), -200.0, logits).requires_grad_()
    close = torch.log_softmax(near, -1)
    limit = topk_policy_gradient_loss(
        close.gather(-1, ids),
        close.gather(-1, torch.tensor(y)[:, None])[:, 0],
        topk,
        beta=beta,
        lam=0.0,
        reduction="sum",
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(limit, near)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_students_stay_close_to_float64(dtype: torch.dtype) -> None:
    logits, teacher = pair(18)
    ids, y = teacher.topk(3).indices, torch.tensor([0, 4, 8])
    logp = torch.log_softmax(logits, -1).to(dtype)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    low = topk_policy_gradient_loss(at_ids, chosen, sparse(ids, teacher, y))
    exact = topk_policy_gradient_loss(at_ids.double(), chosen.double(), sparse(ids, teacher, y))
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_misaligned_or_impossible_arguments_are_refused() -> None:
    logits, teacher = pair(19)
    ids, y = teacher.topk(3).indices, torch.tensor([0, 1, 2])
    rows = sparse(ids, teacher, y)
    logp = torch.log_softmax(logits, -1)
    at_ids, chosen = logp.gather(-1, ids), logp.gather(-1, y[:, None])[:, 0]
    with pytest.raises(AlignmentError, match="different numbers of rows"):
        topk_policy_gradient_loss(at_ids[:2], chosen[:2], rows)
    with pytest.raises(ConfigError, match="differ in K"):
        topk_policy_gradient_loss(at_ids[:, :2], chosen, rows)
    with pytest.raises(ConfigError, match="lam must lie"):
        topk_policy_gradient_loss(at_ids, chosen, rows, lam=1.5)
    with pytest.raises(ConfigError, match="beta must lie"):
        topk_policy_gradient_loss(at_ids, chosen, rows, beta=-0.1)
    with pytest.raises(ConfigError, match="behavior_logp is not finite"):
        topk_policy_gradient_loss(at_ids, chosen, rows, behavior_logp=chosen * math.nan)
    with pytest.raises(ConfigError, match="must be boolean"):
        topk_policy_gradient_loss(at_ids, chosen, rows, torch.ones(3))
