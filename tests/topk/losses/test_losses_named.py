"""Entropy-aware distillation, EOPD, TAID and KD: what is theirs alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.topk.every_loss import jsd, pair, pairs, seeds, teacher_rows
from topkd.topk.errors import ConfigError
from topkd.topk.losses import (
    KDLoss,
    entropy_aware_opd_loss,
    eopd_loss,
    sparse_divergence_loss,
    taid_loss,
    teacher_entropy,
)
from topkd.topk.losses.divergence import divergence


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


def test_options_of_the_other_losses_are_refused_when_wrong() -> None:
    student, teacher = pair(21, (2, 5))
    with pytest.raises(ConfigError, match="t must lie"):
        taid_loss(student, teacher, t=1.2)
    with pytest.raises(ConfigError, match="h_max must be positive"):
        entropy_aware_opd_loss(student, teacher, h_max=0.0)
    with pytest.raises(ConfigError, match="k must be at least 1"):
        eopd_loss(student, teacher, sampled_ids=torch.zeros(2).long(), k=0)
    with pytest.raises(ConfigError, match="sampled_ids must be integers"):
        eopd_loss(student, teacher, sampled_ids=torch.zeros(3).long())
    with pytest.raises(ConfigError, match="shift=True needs"):
        KDLoss()(student, teacher, None, shift=True)
    with pytest.raises(ConfigError, match="row_weight is not finite"):
        sparse_divergence_loss(student, teacher_rows(teacher, 2), row_weight=torch.full((2,), math.nan))
