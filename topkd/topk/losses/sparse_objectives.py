"""TAID and the entropy-aware losses for a teacher that is known only at K ids per row.

The entropy H_T is bounded: with the tail as one event from below, with the tail spread evenly over the other ids from
above. The metrics count the rows that these two bounds leave undecided.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from topkd.topk.fused import gather_logprobs
from topkd.topk.losses.cross_entropy import blend, cross_entropy, entropy
from topkd.topk.losses.divergence import divergence, log_softmax
from topkd.topk.losses.entropy import add_covering_term, check_gate, sampled_reverse_kl
from topkd.topk.losses.jsd import Tail
from topkd.topk.losses.sparse import bins, check_sparse_options, select_teacher
from topkd.topk.losses.teacher import SparseTeacher, Teacher
from topkd.topk.losses.tokens import Reduction, check_logits, reduce_mean, reduce_tokens, select_behavior, to_widest
from topkd.topk.maths.scalars import check_above_zero, check_fraction


def sparse_taid_loss(
    student_logits: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    t: float,
    tail: Tail = "bucket",
    k: int | None = None,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute CE(p_t, S), p_t proportional to S^(1-t) T^t on list and tail, averaged over valid rows; and {"kl", "t"}.

    With tail="renormalise" it is TAID of the two conditional distributions on the list. With "bucket" the blend is
    computed on the K + 1 bins; this differs from blending the whole vocabulary first (a geometric mean does not commute
    with a sum). t = 1 is cross-entropy against the teacher's bins: KDLoss from a list. Natural logs; gradient s - p_t
    on the bins (arXiv:2501.16937). Approximate only because the teacher's tail is one number.

    Args:
        student_logits: [N, V] or [B, T, V].
        teacher: The same rows.
        mask: bool, True = valid; None = all. Holes are also masked.
        t: Interpolation weight of the teacher, in [0, 1].
        tail: "bucket" or "renormalise".
        k: Use only the k most probable entries.
        num_tokens: Divide by this instead of the valid rows of this batch.

    Returns:
        (loss, metrics).
    """
    check_fraction("t", t)
    check_sparse_options(0.5, tail, 1.0)
    check_logits(student_logits=student_logits)
    rows, used = select_teacher(teacher, mask, student_logits.shape[:-1], student_logits, k)
    logp, _ = gather_logprobs(student_logits[used], rows.ids)
    per_row, kl_row = taid_rows(logp, rows, t=t, tail=tail)
    loss = reduce_mean(per_row, per_row.shape[0], num_tokens)
    kl = reduce_mean(kl_row, per_row.shape[0], num_tokens)
    return loss, {"kl": float(kl), "t": float(t)}


def taid_rows(student_logp: Tensor, rows: SparseTeacher, *, t: float, tail: Tail) -> tuple[Tensor, Tensor]:
    """Compute each row's CE(p_t, S) and detached KL(p_t||S), [N], from student logprobs [N, K] at the teacher's ids."""
    teacher_bins, student_bins = bins(student_logp, rows, tail)
    target = log_softmax(blend(student_bins.detach(), teacher_bins, t))
    per_row = cross_entropy(target, student_bins)
    return per_row, per_row.detach() - entropy(target)


def sparse_entropy_aware_loss(
    student_logits: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    h_max: float | None = None,
    k: int | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the mean of w KL(T||S) + (1-w) KL(S||T) on K + 1 bins, w from the *lower* entropy bound; and mean w.

    w = clamp(H_low / h_max, 0, 1), natural logs, >= 0. Approximate: both KLs are lower bounds of the full-vocabulary
    ones, and w is a lower bound of the exact weight. A soft mix; the paper's hard gate (arXiv:2603.07079) is
    ``sparse_eopd_loss``.

    Args:
        student_logits: [N, V] or [B, T, V].
        teacher: The same rows.
        mask: bool, True = valid; None = all. Holes are also masked.
        h_max: Entropy from which the loss is only the forward KL; ln V by default.
        k: Use only the k most probable entries.
        reduction: "mean" or "sum".
        num_tokens: Divide by this instead of the valid rows of this batch.

    Returns:
        (loss, {"w_low", "w_high"}): the mean weight from the lower bound, which was used, and from the upper one.
    """
    check_above_zero(h_max=h_max)
    check_logits(student_logits=student_logits)
    vocab = student_logits.shape[-1]
    limit = math.log(vocab) if h_max is None else h_max
    rows, used = select_teacher(teacher, mask, student_logits.shape[:-1], student_logits, k)
    logp, _ = gather_logprobs(student_logits[used], rows.ids)
    per_row, low, high = entropy_aware_rows(logp, rows, h_max=limit, vocab_size=vocab)
    loss = reduce_tokens(per_row, used, reduction, num_tokens)
    count = max(low.shape[0], 1)
    return loss, {"w_low": float(low.sum()) / count, "w_high": float(high.sum()) / count}


def entropy_aware_rows(
    student_logp: Tensor, rows: SparseTeacher, *, h_max: float, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute each row's loss, and its weights from the lower and the upper entropy bound, [N] each."""
    both = bins(student_logp, rows, "bucket")
    low, high = ((bound / h_max).clamp(0.0, 1.0).to(student_logp.dtype) for bound in bound_entropy(rows, vocab_size))
    forward = torch.where(low == 0, 0.0, low * divergence(*both, 0.0))
    reverse = torch.where(low == 1, 0.0, (1.0 - low) * divergence(*both, 1.0))
    return forward + reverse, low, high


def sparse_eopd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    tau: float = 0.8,
    alpha: float = 1.0,
    k: int | None = 16,
    behavior_logp: Tensor | None = None,
    cap: float | None = None,
    advantage_clip: float | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute ``eopd_loss`` from a list: L_OPD + alpha 1[H_low >= tau] KL(T~_k || S), and metrics (arXiv:2603.07079).

    The sampled token and its exact teacher logprob are the rows' ``actual_ids`` and ``actual_logp``; rows without them
    are masked. The forward KL is added only where the list's lower entropy bound is at least tau: the only
    approximation. Natural logs; A = log t(y) - log s(y), so the gradient of L_OPD is that of KL(S||T).

    Args:
        student_logits: [N, V] or [B, T, V].
        teacher: The same rows.
        mask: bool, True = valid; None = all. Holes are also masked.
        tau: Entropy from which the forward KL is added, in nats.
        alpha: Weight of the forward KL.
        k: Number of listed ids in the forward KL; None = all.
        behavior_logp: Logprob of the sampled tokens under the policy that sampled them; None = on-policy.
        cap: Upper bound of the ratio, detached; None = none.
        advantage_clip: Bound of |A|; None = none.
        reduction: "mean" or "sum".
        num_tokens: Divide by this instead of the valid rows of this batch.

    Returns:
        (loss, metrics): gate_fraction, undecided (rows with H_low < tau <= H_high), kl, excluded.
    """
    check_above_zero(cap=cap, advantage_clip=advantage_clip)
    check_gate(tau, alpha)
    check_logits(student_logits=student_logits)
    rows, used = select_teacher(teacher, mask, student_logits.shape[:-1], student_logits, None)
    known = (rows.actual_ids >= 0) & ~torch.isnan(rows.actual_logp)
    rows, used = rows.rows(known), used.masked_scatter(used, known)
    ids = torch.cat([rows.ids, rows.actual_ids.unsqueeze(-1)], -1)
    logp, _ = gather_logprobs(student_logits[used], ids)
    behavior = select_behavior(behavior_logp, used)
    t_y = rows.actual_logp.to(logp.dtype)
    sampled, advantage, finite = sampled_reverse_kl(logp[:, -1], t_y, behavior, cap, advantage_clip)
    covering, low, high = gate_rows(logp[:, :-1], rows, tau=tau, k=k, vocab_size=student_logits.shape[-1])
    loss = reduce_tokens(add_covering_term(sampled, covering, alpha), used, reduction, num_tokens)
    return loss, {
        "gate_fraction": float((low >= tau).sum()) / max(low.shape[0], 1),
        "undecided": float(((low < tau) & (high >= tau)).sum()),
        "kl": -float(advantage.sum()) / max(int(finite.sum()), 1),
        "excluded": float((~finite).sum()),
    }


def gate_rows(
    student_logp: Tensor, rows: SparseTeacher, *, tau: float, k: int | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute each row's (1[H_low >= tau] KL(T~_k || S), H_low, H_high), [N] each."""
    low, high = bound_entropy(rows, vocab_size)
    top = rows.head(k)
    covering = divergence(log_softmax(top.logp.to(student_logp.dtype)), student_logp[:, : top.ids.shape[-1]], 0.0)
    return torch.where(low >= tau, covering, 0.0), low, high


def bound_entropy(rows: SparseTeacher, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Bound H_T in nats, (lower, upper) [N]: the tail as one event, and spread evenly over the other V - K ids."""
    head, tail = entropy(to_widest(rows.logp)), to_widest(rows.tail_logp)
    others = (vocab_size - rows.listed.sum(-1)).clamp(min=0)
    mass = torch.where(others > 0, tail.exp(), 0.0)
    low = (head - mass * tail).clamp(min=0.0)
    return low, low + mass * torch.log(others.clamp(min=1).to(tail.dtype))
