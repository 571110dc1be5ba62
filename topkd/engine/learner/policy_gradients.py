"""Policy gradients: an advantage on the sampled token, and the top-K estimator that needs one for the tail alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from topkd.engine.config.objectives import GJS, ScalarKL, TopKPolicyGradient
from topkd.engine.learner.token_view import LossOutput, TokenView
from topkd.topk import gjs_advantage, scalar_kl_advantage
from topkd.topk.losses import (
    SparseTeacher,
    importance_sampling_loss,
    ppo_clip_loss,
    topk_policy_gradient_loss,
)
from topkd.topk.losses.topk_policy import compute_bucket_divergence
from topkd.topk.maths.baselines import discounted_return, value_baseline
from topkd.topk.types import Float64


def compute_sampled_gradient(objective: ScalarKL | GJS, view: TokenView) -> LossOutput:
    """Compute the loss of a sampled-token objective."""
    beta = 1.0 if isinstance(objective, ScalarKL) else objective.beta
    advantage = own_advantage(objective, view)
    if objective.needs_list:
        rows = drop_zero_entries(view.teacher) if beta == 1.0 else view.teacher
        if objective.baseline == "value":
            advantage = advantage - mean_advantage(view.logp_at_ids, rows, beta)
        if objective.sums_returns:
            divergence = compute_bucket_divergence(view.logp_at_ids, rows, beta).cpu().numpy()
            own = None if objective.advantage == "state" else advantage
            advantage = discounted_return(own, divergence, objective.gamma, lengths=view.lengths)
    if objective.advantage_clip is not None:
        advantage = np.clip(advantage, -objective.advantage_clip, objective.advantage_clip)
    return LossOutput(weight_gradients(view, advantage), advantage)


def own_advantage(objective: ScalarKL | GJS | TopKPolicyGradient, view: TokenView) -> Float64:
    """A of each token from its two logprobs alone, float64 [N]."""
    current = view.logp_new.detach().cpu().numpy()
    teacher = view.teacher.actual_logp.cpu().numpy()
    if isinstance(objective, ScalarKL):
        return np.asarray(scalar_kl_advantage(teacher, current), dtype=np.float64)
    return np.asarray(gjs_advantage(teacher, current, objective.beta), dtype=np.float64)


def compute_topk_gradient(objective: TopKPolicyGradient, view: TokenView) -> LossOutput:
    """Compute the top-K policy gradient; at gamma > 0 the sampled token adds the discounted divergences that follow."""
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
    advantage = own_advantage(objective, view)
    if objective.sums_returns:
        rows = drop_zero_entries(view.teacher) if objective.beta == 1.0 else view.teacher
        divergence = compute_bucket_divergence(view.logp_at_ids, rows, objective.beta).cpu().numpy()
        following = discounted_return(None, divergence, objective.gamma, lengths=view.lengths)
        loss = loss + weight_gradients(view, following)
    counts, means = {"gated_rows": counted["gated_rows"]}, {"divergence_bucket": counted["divergence_bucket"]}
    return LossOutput(loss, advantage, counts, means)


def weight_gradients(view: TokenView, advantage: Float64) -> Tensor:
    """-(1/N) sum of advantage times the token's gradient, its ratio bounded as the config says."""
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
    """(logprobs that ratios are taken against, their cap); without importance sampling every ratio is 1."""
    if view.importance.kind == "truncated":
        return view.behavior_logp, view.importance.cap
    return view.logp_new.detach(), 1.0


def mean_advantage(student_logp: Tensor, rows: SparseTeacher, beta: float) -> Float64:
    """The value baseline of each token from the list and one tail bin, float64 [N]."""
    listed = rows.listed.cpu().numpy()
    teacher = rows.logp.cpu().numpy().astype(np.float64)
    student = np.where(listed, student_logp.detach().cpu().numpy().astype(np.float64), -np.inf)
    tail = rows.tail_logp.cpu().numpy()  # of the served values: a cache may have rounded the list since
    return value_baseline(np.where(listed, teacher, -np.inf), student, beta, teacher_tail_logp=tail)


def drop_zero_entries(rows: SparseTeacher) -> SparseTeacher:
    """The rows with ids of teacher probability zero left to the tail: at beta = 1 they alone would make it infinite."""
    return replace(rows, ids=torch.where(torch.isneginf(rows.logp), -1, rows.ids))


def find_finite_suffix(
    valid: Sequence[bool] | np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Where a place and every later one is valid: a return over what follows is known only there."""
    flipped = np.asarray(valid, dtype=np.bool_)[::-1]
    return np.asarray(np.logical_and.accumulate(flipped)[::-1])
