"""Arguments of the losses that cannot be right: one ConfigError by name, no number, no torch error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from topkd.topk import TopK, topk_weights
from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.fused import gather_logprobs
from topkd.topk.losses import (
    KDLoss,
    SparseTeacher,
    TAIDScheduler,
    entropy_aware_opd_loss,
    eopd_loss,
    fused_divergence_loss,
    fused_topk_policy_gradient_loss,
    generalized_jsd_loss,
    icepop_loss,
    importance_sampling_loss,
    ppo_clip_loss,
    reinforce_loss,
    sparse_divergence_loss,
    sparse_entropy_aware_loss,
    sparse_eopd_loss,
    sparse_taid_loss,
    taid_loss,
    teacher_entropy,
    topk_policy_gradient_loss,
)

Z = torch.tensor([[0.1, 0.5, -0.3, 0.2, -1.0], [0.0, -0.5, 0.3, 1.2, 0.4]])
LOGP = torch.log_softmax(Z, -1)
HEAD = torch.tensor([[0.1 * i - 0.2 * j for j in range(5)] for i in range(7)])
SAMPLED = torch.tensor([1, 2])
TEACHER = TopK.from_lists([[(0, -0.5), (1, -2.0)]] * 2, actual_ids=[3, 3], actual_logp=[-4.0, -4.0])

DENSE: dict[str, Callable[[Any, Any], Any]] = {
    "jsd": generalized_jsd_loss,
    "taid": lambda s, t: taid_loss(s, t, t=0.5),
    "kd": lambda s, t: KDLoss()(s, t, None),
    "entropy_aware": entropy_aware_opd_loss,
    "eopd": lambda s, t: eopd_loss(s, t, sampled_ids=SAMPLED),
}
SPARSE: dict[str, Callable[[Any, Any], Any]] = {
    "divergence": sparse_divergence_loss,
    "taid": lambda z, t: sparse_taid_loss(z, t, t=0.5),
    "entropy_aware": sparse_entropy_aware_loss,
    "eopd": sparse_eopd_loss,
    "fused_divergence": lambda z, t: fused_divergence_loss(z, HEAD, t),
    "fused_policy": lambda z, t: fused_topk_policy_gradient_loss(z, HEAD, t),
}
MASKED: dict[str, Callable[[Any], Any]] = {
    "jsd": lambda m: generalized_jsd_loss(Z, Z, m),
    "taid": lambda m: taid_loss(Z, Z, m, t=0.5),
    "kd": lambda m: KDLoss()(Z, Z, m),
    "eopd": lambda m: eopd_loss(Z, Z, mask=m, sampled_ids=SAMPLED),
    "sparse": lambda m: sparse_divergence_loss(Z, TEACHER, m),
    "policy": lambda m: topk_policy_gradient_loss(LOGP[:, :2], LOGP[:, 3], TEACHER, m),
    "is": lambda m: importance_sampling_loss(Z[:, 0], Z[:, 1], Z[:, 2], m),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    "value", [None, Z.tolist(), Z.numpy(), torch.tensor(1.0), Z[:, :0]], ids=lambda v: type(v).__name__
)
def test_what_are_no_logits_is_refused(name: str, value: object) -> None:
    for student, teacher in ((value, Z), (Z, value), (value, value)):
        with pytest.raises(ConfigError, match="logits"):
            DENSE[name](student, teacher)
    with pytest.raises(ConfigError, match="teacher_logits"):
        teacher_entropy(value)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    "mask", [[True, True], np.ones(2, dtype=bool), torch.ones(2), torch.ones(2, dtype=torch.int64)]
)
def test_a_mask_is_a_boolean_tensor(name: str, mask: object) -> None:
    with pytest.raises(ConfigError, match=r"mask|labels"):
        MASKED[name](mask)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("value", [None, "x", 1.0, [[(0, -1.0)]] * 2, Z], ids=lambda v: type(v).__name__)
def test_a_teacher_is_a_topk_or_made_of_them(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="teacher: not a TopK"):
        SPARSE[name](Z, value)


NO_NUMBERS = ("x", True, "1", torch.tensor([0.1, 0.2]), math.nan, -1.0)
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "beta": lambda v: generalized_jsd_loss(Z, Z, beta=v),
    "temperature": lambda v: generalized_jsd_loss(Z, Z, temperature=v),
    "top_k": lambda v: generalized_jsd_loss(Z, Z, top_k=v),
    "token_clip": lambda v: generalized_jsd_loss(Z, Z, token_clip=v),
    "num_tokens": lambda v: generalized_jsd_loss(Z, Z, num_tokens=v),
    "t": lambda v: taid_loss(Z, Z, t=v),
    "h_max": lambda v: entropy_aware_opd_loss(Z, Z, h_max=v),
    "alpha": lambda v: eopd_loss(Z, Z, sampled_ids=SAMPLED, alpha=v),
    "k": lambda v: eopd_loss(Z, Z, sampled_ids=SAMPLED, k=v),
    "k ": lambda v: sparse_divergence_loss(Z, TEACHER, k=v),
    "cap": lambda v: importance_sampling_loss(Z[:, 0], Z[:, 1], Z[:, 2], cap=v),
    "clip": lambda v: ppo_clip_loss(Z[:, 0], Z[:, 1], Z[:, 2], clip=v),
    "dual_clip": lambda v: ppo_clip_loss(Z[:, 0], Z[:, 1], Z[:, 2], dual_clip=v),
    "low": lambda v: icepop_loss(Z[:, 0], Z[:, 1], Z[:, 2], low=v),
    "lam": lambda v: topk_policy_gradient_loss(LOGP[:, :2], LOGP[:, 3], TEACHER, lam=v),
    "chunk": lambda v: fused_divergence_loss(Z, HEAD, TEACHER, chunk=v),
    "num_train_steps": TAIDScheduler,
    "alpha ": lambda v: TAIDScheduler(5, alpha=v),
    "t_start": lambda v: TAIDScheduler(5, t_start=v),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_no_numbers_in_their_range_are_refused_by_name(name: str) -> None:
    for value in NO_NUMBERS:
        with pytest.raises(ConfigError, match=name.strip()):
            OPTIONS[name](value)


def test_a_gate_that_is_not_a_number_never_stays_shut_in_silence() -> None:
    for tau in (math.nan, None, "x"):
        with pytest.raises(ConfigError, match="tau"):
            eopd_loss(Z, Z, sampled_ids=SAMPLED, tau=tau)
        with pytest.raises(ConfigError, match="tau"):
            sparse_eopd_loss(Z, TEACHER, tau=tau)


def test_sampled_ids_outside_the_vocabulary_are_refused_where_they_are_valid() -> None:
    padded = torch.tensor([1, -100])
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        eopd_loss(Z, Z, sampled_ids=padded)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        eopd_loss(Z, Z, sampled_ids=torch.tensor([1, 5]))
    for wrong in (padded.float(), padded > 0, padded[:1]):
        with pytest.raises(ConfigError, match=r"sampled_ids must be integers.*got torch\."):
            eopd_loss(Z, Z, sampled_ids=wrong)
    masked = eopd_loss(Z, Z.flip(0), sampled_ids=padded, mask=torch.tensor([True, False]))
    assert masked.item() == pytest.approx(eopd_loss(Z[:1], Z[1:], sampled_ids=padded[:1]).item())


def test_logits_in_place_of_logprobs_are_refused_and_only_where_they_count() -> None:
    wrong, mask = LOGP[:, :2].clone(), torch.tensor([True, False])
    wrong[1] = torch.tensor([2.0, 1.0])
    with pytest.raises(ConfigError, match=r"student_logp_at_ids: mass above 1 .row 1"):
        topk_policy_gradient_loss(wrong, LOGP[:, 3], TEACHER)
    masked = topk_policy_gradient_loss(wrong, LOGP[:, 3], TEACHER, mask)
    assert masked.item() == topk_policy_gradient_loss(LOGP[:, :2], LOGP[:, 3], TEACHER, mask).item()
    half = torch.log(torch.tensor([[0.6, 0.4], [0.7, 0.3]])).bfloat16()  # its own rounding is no mistake
    assert math.isfinite(topk_policy_gradient_loss(half, LOGP[:, 3].bfloat16(), TEACHER).item())


@pytest.mark.parametrize("rows", [(3, 1), (4,), (2, 2, 0)])
def test_sequences_that_do_not_fit_the_batch_are_refused_also_where_their_rows_add_up(rows: tuple[int, ...]) -> None:
    one = TEACHER.slice(slice(0, 1))
    parts = [TopK.concat([one] * count) for count in rows]
    logp = LOGP[:1].expand(2, 2, 5)
    with pytest.raises(AlignmentError, match="do not fit the student's positions"):
        topk_policy_gradient_loss(logp[..., :2], logp[..., 3], parts)
    flat = topk_policy_gradient_loss(logp[..., :2], logp[..., 3], TopK.concat(parts))
    assert flat.item() == pytest.approx(topk_policy_gradient_loss(LOGP[:1, :2], LOGP[:1, 3], one).item())


def test_a_sparse_teacher_of_other_shapes_is_refused() -> None:
    good = (torch.tensor([[1, 2]]), torch.tensor([[-0.5, -2.0]]), torch.tensor([-1.5]), torch.tensor([-1]))
    unknown = torch.tensor([math.nan])
    assert SparseTeacher(*good, unknown).signal.all()
    for place, wrong in (
        (0, good[0].int()),
        (0, good[0][0]),
        (1, good[1][:, :1]),
        (2, good[2][None]),
        (3, good[3][:0]),
    ):
        parts = [*good, unknown]
        parts[place] = wrong
        with pytest.raises(ConfigError, match="SparseTeacher"):
            SparseTeacher(*parts)


@pytest.mark.parametrize("loss", ["dense", "sparse"])
def test_a_gated_divergence_of_weight_zero_is_dropped_even_where_it_is_infinite(loss: str) -> None:
    student = torch.tensor([[0.0, 1.0, -math.inf, 0.5, 0.2]])  # excludes an id that the teacher lists
    teacher = TopK.from_lists([[(2, -1.0), (1, -1.5)]], actual_ids=[1], actual_logp=[-1.5])
    got = (
        eopd_loss(student, Z[:1], sampled_ids=SAMPLED[:1], tau=0.0, alpha=0.0)
        if loss == "dense"
        else sparse_eopd_loss(student, teacher, tau=0.0, alpha=0.0)[0]
    )
    s_y = torch.log_softmax(student, -1)[0, 1].item()
    t_y = LOGP[0, 1].item() if loss == "dense" else -1.5
    assert got.item() == pytest.approx(-(t_y - s_y) * s_y, rel=1e-5)


def test_tensors_that_are_none_are_refused_in_the_policy_losses() -> None:
    for call in (importance_sampling_loss, ppo_clip_loss, icepop_loss):
        for arguments in ((None, Z[0], Z[0]), (Z[0], None, Z[0]), (Z[0], Z[0], 1.0)):
            with pytest.raises(ConfigError, match="not a tensor"):
                call(*arguments)
    with pytest.raises(ConfigError, match="not a tensor"):
        reinforce_loss(Z[0], [1.0])
    with pytest.raises(ConfigError, match="not a tensor"):
        topk_policy_gradient_loss(LOGP[:, :2].tolist(), LOGP[:, 3], TEACHER)
    with pytest.raises(ConfigError, match="row_weight and the mask differ in shape"):
        sparse_divergence_loss(Z, TEACHER, row_weight=torch.ones(1))
    with pytest.raises(ConfigError, match="floating-point"):
        gather_logprobs(Z.long(), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_row_without_any_finite_logit_is_no_distribution_and_its_divergence_is_nan(beta: float) -> None:
    dead = torch.full((1, 5), -math.inf)
    for student, teacher in ((dead, Z[:1]), (Z[:1], dead), (dead, dead)):
        for options in ({}, {"top_k": 2}, {"top_k": 2, "tail": "bucket"}):
            assert math.isnan(generalized_jsd_loss(student, teacher, beta=beta, **options).item())
        assert math.isnan(entropy_aware_opd_loss(student, teacher).item())
        assert math.isnan(eopd_loss(student, teacher, sampled_ids=SAMPLED[:1]).item())
    assert math.isnan(teacher_entropy(dead).item())
    both = generalized_jsd_loss(torch.cat([dead, Z]), torch.cat([dead, Z]), torch.tensor([False, True, True]), beta)
    assert both.item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_an_empty_support_is_the_sampled_token_estimator_as_in_numpy(beta: float) -> None:
    empty = TopK(0, np.zeros((2, 0), int), np.zeros((2, 0)), [3, 1], [-4.0, -0.7], [np.nan] * 2)
    actual = LOGP.gather(-1, torch.tensor([[3], [1]])).squeeze(-1).double().requires_grad_()
    loss = topk_policy_gradient_loss(torch.zeros(2, 0).double(), actual, empty, beta=beta, lam=1.0, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, actual)
    weights = topk_weights(empty, np.zeros((2, 0)), actual.detach().numpy(), beta=beta, lam=1.0)[1]
    assert np.abs(weights).min() > 0.01
    np.testing.assert_allclose(gradient.numpy(), -weights, rtol=1e-9)
    hidden = torch.tensor([[0.3, -0.2, 0.1, 0.5, 0.0], [0.1, 0.4, -0.6, 0.2, 0.3]], dtype=torch.float64)
    fused = fused_topk_policy_gradient_loss(hidden, HEAD.double(), empty, beta=beta, lam=1.0)
    assert fused.metrics["masked_rows"] == 0.0
    assert fused.loss.item() != 0.0


def test_losses_of_any_size_leave_a_finite_schedule_that_never_falls() -> None:
    schedule = TAIDScheduler(10, alpha=0.1, beta=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = schedule.t
        for step, loss in enumerate([1e-30, 1e38, 0.0, -3e38, 3e38, 1e300, 2.0]):
            schedule.update_t(loss, step)
            assert math.isfinite(schedule.momentum)
            assert last <= schedule.t <= 1.0
            last = schedule.t
    assert schedule.skipped == 1  # 1e300 is no float32
    with pytest.raises(ConfigError, match="global_step"):
        schedule.update_t(1.0, math.nan)
