"""TAID and the entropy-aware losses on lists: their dense forms where the list says everything, bounded else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from topkd.topk import TopK, entropy_bounds
from topkd.topk.errors import ConfigError
from topkd.topk.losses import (
    KDLoss,
    SparseTeacher,
    entropy_aware_opd_loss,
    eopd_loss,
    sparse_divergence_loss,
    sparse_entropy_aware_loss,
    sparse_eopd_loss,
    sparse_taid_loss,
    taid_loss,
    teacher_entropy,
)
from topkd.topk.losses import sparse_objectives as objectives
from topkd.topk.losses.divergence import log_tail_torch


def pair(seed: int, shape: tuple[int, ...] = (5, 8), scale: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    both = scale * torch.randn(2, *shape, generator=g, dtype=torch.float64)
    return both[0].clone().requires_grad_(), both[1].clone()


def listed(teacher: Tensor, k: int, y: Tensor | None = None) -> SparseTeacher:
    logp = torch.log_softmax(teacher, -1)
    top, ids = logp.topk(k)
    y = torch.zeros(teacher.shape[0], dtype=torch.long) if y is None else y
    return SparseTeacher(ids, top, log_tail_torch(top), y, logp.gather(-1, y[:, None])[:, 0])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_list_of_the_whole_vocabulary_gives_dense_taid_and_kd(t: float) -> None:
    student, teacher = pair(1)
    wanted = taid_loss(student, teacher, t=t)
    ours, metrics = sparse_taid_loss(student, listed(teacher, 8), t=t, tail="renormalise")
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(*[torch.autograd.grad(x, student, retain_graph=True)[0] for x in (ours, wanted)])
    bucket, _ = sparse_taid_loss(student, listed(teacher, 8), t=t)
    assert bucket.item() == pytest.approx(wanted.item(), abs=1e-5)
    if t == 1.0:
        assert ours.item() == pytest.approx(KDLoss()(student, teacher, None).item())
        forward = sparse_divergence_loss(student, listed(teacher, 3), beta=0.0)
        _, metrics = sparse_taid_loss(student, listed(teacher, 3), t=1.0)
        assert metrics["kl"] == pytest.approx(forward.item(), rel=1e-9)


def test_sparse_taid_has_no_gradient_at_t_zero_and_the_right_one_at_t_one() -> None:
    student, teacher = pair(2)
    loss, _ = sparse_taid_loss(student, listed(teacher, 3), t=0.0)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-14
    assert gradcheck(lambda s: sparse_taid_loss(s, listed(teacher, 3), t=1.0)[0], (student,))


def test_entropy_bounds_hold_the_entropy_and_equal_numpys() -> None:
    _, teacher = pair(3, (40, 30), scale=3.0)
    exact = teacher_entropy(teacher)
    for k in (1, 4, 29, 30):
        rows = listed(teacher, k)
        low, high = objectives.bound_entropy(rows, 30)
        assert (low <= exact + 2e-6).all()
        assert (high >= exact - 2e-6).all()
        topk = TopK.from_lists(
            [list(zip(i, v, strict=True)) for i, v in zip(rows.ids.tolist(), rows.logp.float().tolist(), strict=True)]
        )
        for ours, twin in zip((low, high), entropy_bounds(topk, 30), strict=True):
            np.testing.assert_allclose(ours.numpy(), twin, atol=3e-5)


def test_entropy_aware_on_a_full_list_is_the_dense_loss_and_else_between_its_bounds() -> None:
    student, teacher = pair(4)
    wanted = entropy_aware_opd_loss(student, teacher)
    full, metrics = sparse_entropy_aware_loss(student, listed(teacher, 8))
    assert full.item() == pytest.approx(wanted.item(), abs=2e-5)
    assert metrics["w_low"] == pytest.approx(metrics["w_high"], abs=1e-5)
    _, metrics = sparse_entropy_aware_loss(student, listed(teacher, 3))
    exact = (teacher_entropy(teacher) / math.log(8)).mean().item()
    assert metrics["w_low"] < exact < metrics["w_high"]
    assert gradcheck(lambda s: sparse_entropy_aware_loss(s, listed(teacher, 3))[0], (student,))


def test_entropy_aware_from_a_short_list_mixes_both_kls_by_the_lower_bound() -> None:
    student, teacher = pair(9, (6, 8))
    rows = listed(teacher, 3)
    low, high = objectives.bound_entropy(rows, 8)
    weight = low / math.log(8)
    assert ((high - low) / math.log(8) > 0.02).all()
    forward, reverse = (sparse_divergence_loss(student, rows, beta=beta, reduction="none") for beta in (0.0, 1.0))
    got, told = sparse_entropy_aware_loss(student, rows, reduction="sum")
    assert got.item() == pytest.approx((weight * forward + (1 - weight) * reverse).sum().item(), rel=1e-9)
    assert told["w_low"] == pytest.approx(weight.mean().item())


def test_eopd_from_a_list_is_the_dense_one_where_the_bounds_decide() -> None:
    student, teacher = pair(5, (12, 8))
    y = torch.randint(0, 8, (12,), generator=torch.Generator().manual_seed(0))
    behavior = torch.linspace(-3, -1, 12, dtype=torch.float64)
    entropies = teacher_entropy(teacher).sort().values
    tau = float(entropies[5] + entropies[6]) / 2
    kwargs = {"tau": tau, "alpha": 0.5, "k": 3, "behavior_logp": behavior, "cap": 2.0}
    wanted, dense = eopd_loss(student, teacher, sampled_ids=y, return_metrics=True, **kwargs)
    ours, metrics = sparse_eopd_loss(student, listed(teacher, 8, y), **kwargs)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert metrics["undecided"] == 0
    assert metrics["gate_fraction"] == dense["gate_fraction"]
    torch.testing.assert_close(*[torch.autograd.grad(x, student, retain_graph=True)[0] for x in (ours, wanted)])
    _, metrics = sparse_eopd_loss(student, listed(teacher, 3, y), **kwargs)
    low, high = objectives.bound_entropy(listed(teacher, 3, y), 8)
    assert metrics["undecided"] == ((low < tau) & (high >= tau)).sum().item() > 0
    assert metrics["gate_fraction"] == pytest.approx((low >= tau).double().mean().item())
    # a row whose bounds do not decide has the sampled term alone
    rows = ((low < tau) & (high >= tau)).nonzero()[:, 0]
    shut, few = {**kwargs, "behavior_logp": behavior[rows]}, listed(teacher[rows], 3, y[rows])
    alone, _ = sparse_eopd_loss(student[rows], few, **{**shut, "alpha": 0.0})
    undecided, _ = sparse_eopd_loss(student[rows], few, **shut)
    opened, _ = sparse_eopd_loss(student[rows], few, **{**shut, "tau": 0.0})
    assert undecided.item() == alone.item() != opened.item()


def test_rows_without_a_realised_token_or_a_list_are_masked() -> None:
    student, teacher = pair(6)
    rows = listed(teacher, 3)
    rows.actual_logp[1] = math.nan
    rows.ids[3], rows.logp[3] = -1, -math.inf
    keep = torch.tensor([0, 2, 4])
    ours, _ = sparse_eopd_loss(student, rows)
    wanted, _ = sparse_eopd_loss(student[keep], rows.rows(keep))
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert not torch.autograd.grad(ours, student)[0][[1, 3]].any()
    none = torch.zeros(5, dtype=torch.bool)
    for loss in (
        sparse_eopd_loss(student, rows, none)[0],
        sparse_taid_loss(student, rows, none, t=0.5)[0],
        sparse_entropy_aware_loss(student, rows, none)[0],
    ):
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, student)[0].any()


def test_bad_options_are_refused() -> None:
    student, teacher = pair(7)
    with pytest.raises(ConfigError, match="t must lie"):
        sparse_taid_loss(student, listed(teacher, 3), t=2.0)
    with pytest.raises(ConfigError, match="behavior_logp is not finite"):
        sparse_eopd_loss(student, listed(teacher, 3), behavior_logp=torch.full((5,), math.nan))
    with pytest.raises(ConfigError, match="h_max must be positive"):
        sparse_entropy_aware_loss(student, listed(teacher, 3), h_max=-1.0)
