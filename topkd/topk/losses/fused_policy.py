"""The top-K policy gradient from (hidden, lm_head): no N x V logits; gradients are computed in the forward pass."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from topkd.topk.fused import disable_compile, fused_row_loss
from topkd.topk.fused.blocks import accumulator
from topkd.topk.losses.sparse import scale_total, select_teacher
from topkd.topk.losses.teacher import Teacher
from topkd.topk.losses.tokens import Reduction, check_logits, select_behavior
from topkd.topk.losses.topk_policy import (
    SupportWeights,
    compute_bucket_divergence,
    compute_row_losses,
    compute_support_weights,
    find_usable_rows,
    summarise_estimator,
)
from topkd.topk.maths.scalars import check_above_zero, check_beta, check_lam


class FusedPolicyLoss(NamedTuple):
    """Result of one call of the fused estimator.

    Attributes:
        loss: Scalar; its gradient is the estimator, its value a surrogate.
        student_logp: float [n], detached log s(y) of the rows that were used (-inf where y is unknown).
        used: bool, in the mask's shape: which rows were used.
        metrics: As from ``topk_policy_gradient_loss``.
    """

    loss: Tensor
    student_logp: Tensor
    used: Tensor
    metrics: dict[str, float]


@disable_compile
def fused_topk_policy_gradient_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    beta: float = 0.5,
    lam: float = 0.3,
    behavior_logp: Tensor | None = None,
    cap: float | None = 2.0,
    k: int | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    chunk: int | None = None,
) -> FusedPolicyLoss:
    """Compute ``topk_policy_gradient_loss`` from hidden states and head: the same gradient, 1/10 of the memory.

    -mean over rows of sum_A sg[s (g - g_o)] log s + lam 1[y not in A] sg[r (g(y) - g_o)] log s(y): its expected
    gradient is +grad of (1-lam) D_bucket + lam D (GKD's divergence, arXiv:2306.13649; the estimator is this library's,
    docs/math.md).

    The logprobs at the K ids and at the teacher's realised token are computed in row chunks; rows that are masked or
    have no signal are dropped before the head. Natural logs; to be minimised; exact up to rounding.

    Args:
        hidden: [N, H] or [B, T, H].
        weight: lm_head weight [V, H]; may be frozen or tied.
        teacher: The same rows; ``actual_ids`` are the sampled tokens.
        mask: bool [N] or [B, T], True = valid; None = all.
        bias: [V] or None.
        beta: Mixture weight of the teacher (0 forward KL, 1 reverse KL).
        lam: Weight of the sampled tail, in [0, 1].
        behavior_logp: Logprob of the sampled tokens under the policy that sampled them; None = on-policy.
        cap: Upper bound of the ratio; None = none.
        k: Number of entries requested from the server.
        reduction: "mean" divides by the rows that were used; "sum" does not.
        num_tokens: Divide by this instead.
        chunk: Rows at a time; chosen by size when None.

    Returns:
        The loss, the student's logprobs of the sampled tokens, the rows that were used, and metrics.
    """
    check_beta(beta)
    check_lam(lam)
    check_above_zero(cap=cap)
    check_logits(hidden=hidden, weight=weight)
    shape = hidden.shape[:-1]
    rows, used = select_teacher(teacher, mask, shape, hidden, k, usable=partial(find_usable_rows, lam=lam))
    valid = used.numel() if mask is None else int(mask.sum())
    behavior = select_behavior(behavior_logp if lam > 0.0 else None, used)
    made: list[SupportWeights] = []
    buckets: list[Tensor] = []
    student_logp = torch.empty(rows.actual_ids.shape, dtype=accumulator(hidden), device=hidden.device)

    def row_loss(logp: Tensor, lse: Tensor, part: slice) -> Tensor:  # noqa: ARG001 - the protocol's argument
        at_ids, actual, teacher_part = logp[:, :-1], logp[:, -1], rows.rows(part)
        weights = compute_support_weights(
            at_ids,
            actual,
            teacher_part,
            beta=beta,
            lam=lam,
            behavior_logp=None if behavior is None else behavior[part],
            cap=cap,
        )
        made.append(weights)
        buckets.append(compute_bucket_divergence(at_ids, teacher_part, beta))
        student_logp[part] = actual.detach()
        return compute_row_losses(at_ids, actual, weights)

    ids = torch.cat([rows.ids, rows.actual_ids.unsqueeze(-1)], -1)
    total = fused_row_loss(hidden[used], weight, ids, row_loss, bias=bias, chunk=chunk)
    loss = scale_total(total, ids.shape[0], reduction, num_tokens)
    metrics = summarise_estimator(SupportWeights.concat(made), torch.cat([*buckets, student_logp[:0]]), 0)
    metrics["masked_rows"] = float(valid - ids.shape[0])
    return FusedPolicyLoss(loss, student_logp, used, metrics)
