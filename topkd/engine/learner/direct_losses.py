"""Losses on the teacher's whole list, differentiated through the student's exact logprobs at its ids."""

from __future__ import annotations

import math
from typing import assert_never

from torch import Tensor

from topkd.engine.config.objectives import EOPD, KD, TAID, Direct, DirectGJS, EntropyAware, ForwardKL, ReverseKL
from topkd.engine.learner.policy_gradients import drop_zero_entries
from topkd.engine.learner.token_view import TokenView
from topkd.topk.losses.divergence import divergence
from topkd.topk.losses.entropy import sampled_reverse_kl, with_covering
from topkd.topk.losses.sparse import bins
from topkd.topk.losses.sparse_objectives import entropy_aware_rows, gate_rows, taid_rows


def direct_loss(objective: Direct, view: TokenView, *, t: float) -> tuple[Tensor, dict[str, float]]:
    """The loss divided by the step's tokens, and means over this batch's tokens for the run log.

    Args:
        objective: Which.
        view: The tokens.
        t: TAID's interpolation weight at this step; the others do not look at it.
    """
    logp, rows = view.logp_at_ids, view.teacher
    means: dict[str, Tensor] = {}
    match objective:
        case ForwardKL():
            per_row = divergence(*bins(logp, rows, objective.tail), 0.0)
        case ReverseKL():
            per_row = divergence(*bins(logp, drop_zero_entries(rows), objective.tail), 1.0)
        case DirectGJS():
            rows = drop_zero_entries(rows) if objective.beta == 1.0 else rows
            per_row = divergence(*bins(logp, rows, objective.tail), objective.beta)
        case KD():
            per_row, kl = taid_rows(logp, rows, t=1.0, tail=objective.tail)
            means["objective_kl"] = kl
        case TAID():
            per_row, kl = taid_rows(logp, rows, t=t, tail=objective.tail)
            means["objective_kl"] = kl
        case EntropyAware():
            limit = math.log(view.vocab_size) if objective.h_max is None else objective.h_max
            per_row, low, high = entropy_aware_rows(
                logp, drop_zero_entries(rows), h_max=limit, vocab_size=view.vocab_size
            )
            means |= {"entropy_weight_lo": low, "entropy_weight_hi": high}
        case _:
            assert_never(objective)
    return per_row.sum() / view.num_tokens, {name: float(value.mean()) for name, value in means.items()}


def eopd_loss_of(objective: EOPD, view: TokenView) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The entropy-gated loss, the sampled token's advantage [N], and means for the run log."""
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
    undecided = (low < objective.tau) & (high >= objective.tau)
    means = {
        "gate_fraction": float((low >= objective.tau).float().mean()),
        "gate_undecided": float(undecided.float().mean()),
    }
    return with_covering(sampled, covering, objective.alpha).sum() / view.num_tokens, advantage, means
