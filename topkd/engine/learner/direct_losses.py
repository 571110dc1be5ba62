"""Losses on the teacher's whole list, differentiated through the student's exact logprobs at its ids."""

from __future__ import annotations

import math

from torch import Tensor

from topkd.engine.config.objectives import EOPD, KD, TAID, DirectGJS, EntropyAware, ForwardKL, ReverseKL
from topkd.engine.learner.policy_gradients import drop_zero_entries
from topkd.engine.learner.token_view import LossOutput, TokenView
from topkd.topk.losses.divergence import divergence
from topkd.topk.losses.entropy import add_covering_term, sampled_reverse_kl
from topkd.topk.losses.sparse import bins
from topkd.topk.losses.sparse_objectives import entropy_aware_rows, gate_rows, taid_rows


def compute_forward_kl(objective: ForwardKL, view: TokenView) -> LossOutput:
    """Compute KL(T||S) on the bins."""
    return _average(view, divergence(*bins(view.logp_at_ids, view.teacher, objective.tail), 0.0))


def compute_reverse_kl(objective: ReverseKL, view: TokenView) -> LossOutput:
    """Compute KL(S||T) on the bins."""
    rows = drop_zero_entries(view.teacher)
    return _average(view, divergence(*bins(view.logp_at_ids, rows, objective.tail), 1.0))


def compute_gjs(objective: DirectGJS, view: TokenView) -> LossOutput:
    """Compute the generalised Jensen-Shannon divergence on the bins."""
    rows = drop_zero_entries(view.teacher) if objective.beta == 1.0 else view.teacher
    return _average(view, divergence(*bins(view.logp_at_ids, rows, objective.tail), objective.beta))


def compute_kd(objective: KD, view: TokenView) -> LossOutput:
    """Compute the cross-entropy against the teacher's bins."""
    per_row, kl = taid_rows(view.logp_at_ids, view.teacher, t=1.0, tail=objective.tail)
    return _average(view, per_row, objective_kl=kl)


def compute_taid(objective: TAID, view: TokenView) -> LossOutput:
    """Compute the cross-entropy against a target between student and teacher."""
    per_row, kl = taid_rows(view.logp_at_ids, view.teacher, t=view.taid_t, tail=objective.tail)
    return _average(view, per_row, objective_kl=kl)


def compute_entropy_aware(objective: EntropyAware, view: TokenView) -> LossOutput:
    """Compute both KLs, weighed by the teacher's entropy."""
    limit = math.log(view.vocab_size) if objective.h_max is None else objective.h_max
    rows = drop_zero_entries(view.teacher)
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
    """Divide a sum over tokens by the step's number of them; average what the run log shows."""
    return LossOutput(
        per_row.sum() / view.num_tokens, means={name: float(value.mean()) for name, value in means.items()}
    )
