"""Entropy-aware distillation: a soft mix of two KLs, and the hard gate of the paper (arXiv:2603.07079).

These are two algorithms. ``entropy_aware_opd_loss`` mixes forward and reverse KL convexly by H_T / h_max; ``eopd_loss``
adds a forward KL on the teacher's top-k where H_T >= tau to an on-policy sampled-token term. sg[x] is x, detached.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses.cross_entropy import entropy
from topkd.topk.losses.divergence import divergence, log_softmax
from topkd.topk.losses.jsd import check_options, select_rows
from topkd.topk.losses.policy import importance_ratio
from topkd.topk.losses.tokens import (
    FullReduction,
    Reduction,
    boolean_mask,
    check_logits,
    check_same,
    check_tensors,
    labels_mask,
    reduce_tokens,
    select_behavior,
    upcast,
)
from topkd.topk.maths.scalars import check_above_zero, check_positive, check_real


def teacher_entropy(teacher_logits: Tensor) -> Tensor:
    """Compute H_T = -sum_v t log t in nats, exact, float32 (float64 stays), detached; nan for a row of -inf.

    Used by entropy-aware distillation (arXiv:2603.07079); for a top-K list, ``entropy_bounds`` gives bounds.
    """
    check_logits(teacher_logits=teacher_logits)
    return entropy(log_softmax(upcast(teacher_logits.detach()), dead=math.nan))


def entropy_aware_opd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    h_max: float | None = None,
    temperature: float = 1.0,
    reduction: FullReduction = "batchmean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """Compute the mean of w KL(T||S) + (1-w) KL(S||T), w = clamp(H_T / h_max, 0, 1): mode-covering at high H_T.

    The weight and both KLs use the same temperature. This is a soft, convex mix; the paper's hard gate
    (arXiv:2603.07079) is ``eopd_loss``. Natural logs, >= 0, exact over the whole vocabulary.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], detached.
        labels: int [...] with -100 at ignored positions, or a boolean mask; None = every position counts.
        h_max: Entropy from which the loss is only the forward KL; ln V by default.
        temperature: Divides both logits.
        reduction: "batchmean" and "mean" divide by the valid tokens; "sum"; "none" returns [...], 0 at masked places.
        num_tokens: Divide by this instead of the valid tokens of this batch.

    Returns:
        A scalar, or [...] for reduction "none".
    """
    check_options(temperature=temperature)
    check_above_zero(h_max=h_max)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_same("student_logits", student_logits.shape, teacher_logits=teacher_logits)
    mask = labels_mask(labels, student_logits.shape[:-1], student_logits.device)
    student = select_rows(student_logits, mask)
    teacher = select_rows(teacher_logits.detach(), mask).to(student.dtype)
    teacher_logp = log_softmax(teacher / temperature, dead=math.nan)
    student_logp = log_softmax(student / temperature, dead=math.nan)
    limit = math.log(student_logits.shape[-1]) if h_max is None else h_max
    weight = (entropy(teacher_logp) / limit).clamp(0.0, 1.0) if limit > 0 else torch.zeros_like(teacher_logp[..., 0])
    # with weight 0 a KL is left out, because it may be infinite
    forward = torch.where(weight == 0, 0.0, weight * divergence(teacher_logp, student_logp, 0.0))
    reverse = torch.where(weight == 1, 0.0, (1.0 - weight) * divergence(teacher_logp, student_logp, 1.0))
    return reduce_tokens(forward + reverse, mask, reduction, num_tokens)


@overload
def eopd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    sampled_ids: Tensor,
    tau: float = 0.8,
    alpha: float = 1.0,
    k: int = 16,
    behavior_logp: Tensor | None = None,
    cap: float | None = None,
    advantage_clip: float | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def eopd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    sampled_ids: Tensor,
    tau: float = 0.8,
    alpha: float = 1.0,
    k: int = 16,
    behavior_logp: Tensor | None = None,
    cap: float | None = None,
    advantage_clip: float | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, dict[str, float]]: ...
def eopd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    sampled_ids: Tensor,
    tau: float = 0.8,
    alpha: float = 1.0,
    k: int = 16,
    behavior_logp: Tensor | None = None,
    cap: float | None = None,
    advantage_clip: float | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, float]]:
    """Compute the mean of L_OPD + alpha 1[H_T >= tau] KL(T~_k || S): the paper's hard gate (arXiv:2603.07079).

    L_OPD = -sg[r A] log s(y), A = log t(y) - log s(y): the policy gradient of reverse KL(S||T) on the sampled token
    (its *value* is a surrogate; the metric ``kl`` is the k1 estimate). T~_k is the teacher renormalised on its top k
    ids; S is not renormalised; H_T is over the whole vocabulary, in nats, at temperature 1. The mean is over all valid
    tokens, with or without the forward KL.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], detached.
        mask: bool [...], True = valid; None = all valid.
        sampled_ids: int [...], the tokens that were sampled.
        tau: Entropy from which the forward KL is added, in nats (inclusive).
        alpha: Weight of the forward KL.
        k: Number of teacher ids in the forward KL.
        behavior_logp: Logprob of the sampled tokens under the policy that sampled them; None = on-policy (r = 1).
        cap: Upper bound of the ratio r, detached; None = none.
        advantage_clip: Bound of |A|; None = none.
        reduction: "mean" divides by the valid tokens; "sum" does not.
        num_tokens: Divide by this instead.
        return_metrics: Also return gate_fraction, kl, entropy and excluded (the number of tokens to which the teacher
            gives probability zero; they have no sampled-token term).

    Returns:
        A scalar, or (scalar, metrics).
    """
    check_positive("k", k)
    check_gate(tau, alpha)
    check_above_zero(cap=cap, advantage_clip=advantage_clip)
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_same("student_logits", student_logits.shape, teacher_logits=teacher_logits)
    valid = boolean_mask(mask, student_logits.shape[:-1], student_logits.device)
    chosen = select_sampled_ids(sampled_ids, valid, student_logits.shape[-1])
    student_logp = log_softmax(select_rows(student_logits, valid), dead=math.nan)
    teacher_logp = log_softmax(select_rows(teacher_logits.detach(), valid).to(student_logp.dtype), dead=math.nan)
    s_y, t_y = (logp.gather(-1, chosen).squeeze(-1) for logp in (student_logp, teacher_logp))
    behavior = select_behavior(behavior_logp, valid)
    sampled_term, advantage, known = sampled_reverse_kl(s_y, t_y, behavior, cap, advantage_clip)
    h_teacher = entropy(teacher_logp)
    gate = h_teacher >= tau
    covering = torch.where(gate, forward_kl_on_top(teacher_logp, student_logp, k), 0.0)
    loss = reduce_tokens(add_covering_term(sampled_term, covering, alpha), valid, reduction, num_tokens)
    if not return_metrics:
        return loss
    tokens = max(int(valid.sum()), 1)
    metrics = {
        "gate_fraction": float(gate.sum()) / tokens,
        "kl": -float(advantage.sum()) / max(int(known.sum()), 1),
        "entropy": float(h_teacher.sum()) / tokens,
        "excluded": float((~known).sum()),
    }
    return loss, metrics


def select_sampled_ids(sampled_ids: Tensor, valid: Tensor, vocab: int) -> Tensor:
    """Select the sampled ids of the valid positions, int64 [N, 1]; refuse ids outside the vocabulary."""
    check_tensors(sampled_ids=sampled_ids)
    if sampled_ids.shape != valid.shape or sampled_ids.is_floating_point() or sampled_ids.dtype == torch.bool:
        got = f"{sampled_ids.dtype} {tuple(sampled_ids.shape)}"
        raise ConfigError("sampled_ids must be integers, one per position", got=got, expected=tuple(valid.shape))
    chosen = sampled_ids.to(valid.device)[valid].long().unsqueeze(-1)
    if chosen.numel() and bool(((chosen < 0) | (chosen >= vocab)).any()):
        got = f"{int(chosen.min())}..{int(chosen.max())}"
        raise ConfigError(
            "a sampled id lies outside the vocabulary", got=got, expected=f"0..{vocab - 1}", hint="mask padding"
        )
    return chosen


def check_gate(tau: float, alpha: float) -> None:
    """Raise ConfigError unless tau is a number, and alpha is finite and not negative."""
    if math.isnan(check_real("tau", tau)):
        raise ConfigError("tau must be an entropy in nats", got=tau)
    if not 0.0 <= check_real("alpha", alpha) < math.inf:
        raise ConfigError("alpha must be finite and not negative", got=alpha)


def add_covering_term(sampled: Tensor, covering: Tensor, alpha: float) -> Tensor:
    """Compute sampled + alpha * covering; alpha = 0 leaves out ``covering``, which may be infinite (0 * inf is nan)."""
    return sampled + alpha * covering if alpha > 0.0 else sampled


def sampled_reverse_kl(
    student_logp: Tensor, teacher_logp: Tensor, behavior: Tensor | None, cap: float | None, advantage_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (-sg[r A] log s(y), A, known), each [N]: the sampled-token policy gradient of KL(S||T).

    A token with probability zero on one side counts as unknown: its log-ratio is infinite, and it adds nothing.
    """
    known = ~(torch.isneginf(teacher_logp) | torch.isneginf(student_logp))
    advantage = torch.where(known, teacher_logp - student_logp.detach(), 0.0)
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    weight = torch.ones_like(advantage)
    if behavior is not None:
        weight = importance_ratio(student_logp, behavior.to(student_logp.dtype))
        weight = weight if cap is None else weight.clamp(max=cap)
    return -(weight * advantage * torch.where(known, student_logp, 0.0)), advantage, known


def forward_kl_on_top(teacher_logp: Tensor, student_logp: Tensor, k: int) -> Tensor:
    """Compute KL(T~_k || S) over the last axis: T~_k is renormalised on the teacher's k best ids, S is not."""
    top, ids = teacher_logp.topk(min(k, teacher_logp.shape[-1]), dim=-1)
    return divergence(log_softmax(top), student_logp.gather(-1, ids), 0.0)
