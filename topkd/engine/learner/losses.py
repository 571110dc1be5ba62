"""The loss of every objective: policy gradients on sampled tokens, direct losses on the teacher's list; ``LOSSES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from topkd.engine.config.objectives import (
    EOPD,
    GJS,
    KD,
    TAID,
    DirectGJS,
    EntropyAware,
    ForwardKL,
    ReverseKL,
    ScalarKL,
    TopKPolicyGradient,
)
from topkd.engine.learner.token_view import LossOutput, TokenView
from topkd.topk import gjs_advantage
from topkd.topk.losses import (
    SparseTeacher,
    importance_sampling_loss,
    ppo_clip_loss,
    topk_policy_gradient_loss,
)
from topkd.topk.losses.divergence import divergence
from topkd.topk.losses.entropy import add_covering_term, sampled_reverse_kl
from topkd.topk.losses.sparse import bins
from topkd.topk.losses.sparse_objectives import entropy_aware_rows, gate_rows, taid_rows
from topkd.topk.losses.topk_policy import compute_bucket_divergence
from topkd.topk.maths.baselines import discounted_return, value_baseline
from topkd.topk.types import Float64


def compute_sampled_gradient(objective: ScalarKL | GJS, view: TokenView) -> LossOutput:
    """Compute the loss of a sampled-token objective."""
    advantage = compute_own_advantage(view, objective.beta)
    if objective.needs_list:
        rows = _move_zeros_to_tail(view, objective.beta)
        if objective.baseline == "value":
            advantage = advantage - mean_advantage(view.logp_at_ids, rows, objective.beta)
        if objective.sums_returns:
            own = None if objective.advantage == "state" else advantage
            advantage = _sum_returns(objective, view, rows, own)
    if objective.advantage_clip is not None:
        advantage = np.clip(advantage, -objective.advantage_clip, objective.advantage_clip)
    return LossOutput(weight_gradients(view, advantage), advantage)


def compute_own_advantage(view: TokenView, beta: float) -> Float64:
    """Compute each token's advantage from its two logprobs alone, float64 [N]."""
    current, teacher = view.logp_new.detach().cpu().numpy(), view.teacher.actual_logp.cpu().numpy()
    return np.asarray(gjs_advantage(teacher, current, beta), dtype=np.float64)


def _sum_returns(
    objective: ScalarKL | GJS | TopKPolicyGradient, view: TokenView, rows: SparseTeacher, own: Float64 | None
) -> Float64:
    divergences = compute_bucket_divergence(view.logp_at_ids, rows, objective.beta).cpu().numpy()
    return discounted_return(own, divergences, objective.gamma, lengths=view.lengths)


def compute_topk_gradient(objective: TopKPolicyGradient, view: TokenView) -> LossOutput:
    """Compute the top-K policy gradient; at gamma > 0 add the returns of the sampled tokens."""
    reference, cap = _choose_reference(view)
    loss, counted = topk_policy_gradient_loss(
        view.logp_at_ids,
        view.logp_new,
        view.teacher,
        beta=objective.beta,
        lam=objective.lam,
        behavior_logp=reference,
        cap=cap,
        num_tokens=view.num_tokens,
        return_metrics=True,
    )
    advantage = compute_own_advantage(view, objective.beta)
    if objective.sums_returns:
        following = _sum_returns(objective, view, _move_zeros_to_tail(view, objective.beta), None)
        loss = loss + weight_gradients(view, following)
    counts, means = {"gated_rows": counted["gated_rows"]}, {"divergence_bucket": counted["divergence_bucket"]}
    return LossOutput(loss, advantage, counts, means)


def weight_gradients(view: TokenView, advantage: Float64) -> Tensor:
    """Compute -(1/N) sum of ratio * advantage * log s(y), with the ratio bounded as configured."""
    on_device = torch.from_numpy(advantage).to(view.logp_new.device, view.logp_new.dtype)
    if view.importance.kind == "ppo":
        return ppo_clip_loss(
            view.logp_new,
            view.behavior_logp,
            on_device,
            clip=view.importance.clip,
            dual_clip=view.importance.dual_clip,
            num_tokens=view.num_tokens,
        )
    reference, cap = _choose_reference(view)
    return importance_sampling_loss(view.logp_new, reference, on_device, cap=cap, num_tokens=view.num_tokens)


def _choose_reference(view: TokenView) -> tuple[Tensor, float]:
    """Choose the logprobs that ratios divide by, and the cap; without importance sampling ratios are 1."""
    if view.importance.kind == "truncated":
        return view.behavior_logp, view.importance.cap
    return view.logp_new.detach(), 1.0


def mean_advantage(student_logp: Tensor, rows: SparseTeacher, beta: float) -> Float64:
    """Compute the value baseline of each token from the list and one tail bin, float64 [N]."""
    listed = rows.listed.cpu().numpy()
    teacher = rows.logp.cpu().numpy().astype(np.float64)
    student = np.where(listed, student_logp.detach().cpu().numpy().astype(np.float64), -np.inf)
    tail = rows.tail_logp.cpu().numpy()  # from the server's unrounded values: a cache may have rounded the list
    return value_baseline(np.where(listed, teacher, -np.inf), student, beta, teacher_tail_logp=tail)


def _move_zeros_to_tail(view: TokenView, beta: float) -> SparseTeacher:
    """Return the teacher's rows; at beta = 1, move ids of teacher probability zero to the tail.

    One such id would make the divergence infinite.
    """
    rows = view.teacher
    return replace(rows, ids=torch.where(torch.isneginf(rows.logp), -1, rows.ids)) if beta == 1.0 else rows


def find_finite_suffix(
    valid: Sequence[bool] | np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Find the positions that are valid and have only valid ones after them: returns are known only there."""
    flipped = np.asarray(valid, dtype=np.bool_)[::-1]
    return np.asarray(np.logical_and.accumulate(flipped)[::-1])


def compute_divergence(objective: ForwardKL | ReverseKL | DirectGJS, view: TokenView) -> LossOutput:
    """Compute KL(T||S), KL(S||T) or the generalised Jensen-Shannon divergence on list and tail."""
    rows = _move_zeros_to_tail(view, objective.beta)
    return _average(view, divergence(*bins(view.logp_at_ids, rows, objective.tail), objective.beta))


def compute_cross_entropy(objective: KD | TAID, view: TokenView) -> LossOutput:
    """Compute the cross-entropy against the teacher (KD), or against TAID's moving target."""
    per_row, kl = taid_rows(view.logp_at_ids, view.teacher, t=view.taid_t, tail=objective.tail)
    return _average(view, per_row, objective_kl=kl)


def compute_entropy_aware(objective: EntropyAware, view: TokenView) -> LossOutput:
    """Compute the mix of both KLs, weighted by the teacher's entropy."""
    limit = math.log(view.vocab_size) if objective.h_max is None else objective.h_max
    rows = _move_zeros_to_tail(view, 1.0)
    per_row, low, high = entropy_aware_rows(view.logp_at_ids, rows, h_max=limit, vocab_size=view.vocab_size)
    return _average(view, per_row, entropy_weight_lo=low, entropy_weight_hi=high)


def compute_eopd(objective: EOPD, view: TokenView) -> LossOutput:
    """Compute the sampled reverse KL, plus a forward KL where the teacher's entropy is high."""
    truncated = view.importance.kind == "truncated"
    sampled, advantage, _ = sampled_reverse_kl(
        view.logp_new,
        view.teacher.actual_logp,
        view.behavior_logp if truncated else None,
        view.importance.cap if truncated else None,
        objective.advantage_clip,
    )
    covering, low, high = gate_rows(
        view.logp_at_ids, view.teacher, tau=objective.tau, k=objective.top, vocab_size=view.vocab_size
    )
    means = {
        "gate_fraction": float((low >= objective.tau).float().mean()),
        "gate_undecided": float(((low < objective.tau) & (high >= objective.tau)).float().mean()),
    }
    loss = add_covering_term(sampled, covering, objective.alpha).sum() / view.num_tokens
    return LossOutput(loss, advantage.cpu().double().numpy(), means=means)


def _average(view: TokenView, per_row: Tensor, **means: Tensor) -> LossOutput:
    """Divide a sum over tokens by the step's token count; average the values for the run log."""
    return LossOutput(
        per_row.sum() / view.num_tokens, means={name: float(value.mean()) for name, value in means.items()}
    )


ObjectiveLoss: TypeAlias = Callable[[Any, TokenView], LossOutput]
"""(an objective's settings, the tokens) -> the loss."""

LOSSES: Mapping[str, ObjectiveLoss] = {
    "scalar_kl": compute_sampled_gradient,
    "gjs": compute_sampled_gradient,
    "topk_pg": compute_topk_gradient,
    "fkl": compute_divergence,
    "rkl": compute_divergence,
    "gjs_direct": compute_divergence,
    "kd": compute_cross_entropy,
    "taid": compute_cross_entropy,
    "entropy_aware": compute_entropy_aware,
    "eopd": compute_eopd,
}
"""Objective kind -> its loss; ``sft`` has none here, it trains on texts (``compute_text_loss``)."""
