"""Divergences against a teacher that is known only at K ids per row, from logits or from (hidden, lm_head).

``tail="bucket"`` compares K + 1 bins: the K ids, and all other ids as one. The value is exact for these bins, never
above the full-vocabulary divergence, and grows with K. ``tail="renormalise"`` compares the conditional distributions on
the K ids: it ignores the mass outside, and is zero at K = 1. beta = 0 is forward KL(T||S), 1 reverse KL(S||T), between
them GJS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.fused import disable_compile, fused_row_loss, gather_logprobs, subset_logits
from topkd.topk.fused.blocks import accumulator
from topkd.topk.losses.divergence import divergence, log_softmax, log_tail_torch
from topkd.topk.losses.jsd import Tail, append_tail, check_options
from topkd.topk.losses.teacher import SparseTeacher, Teacher, flatten_teacher
from topkd.topk.losses.tokens import (
    FullReduction,
    Reduction,
    boolean_mask,
    check_logits,
    reduce_mean,
    reduce_tokens,
    select_known,
    to_widest,
)
from topkd.topk.maths.scalars import check_beta

Usable: TypeAlias = Callable[[SparseTeacher], Tensor]
"""Returns which rows can train: bool [N]."""


def sparse_divergence_loss(
    student_logits: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    k: int | None = None,
    row_weight: Tensor | None = None,
    reduction: FullReduction = "mean",
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """Compute GJS_beta (KL at beta 0 or 1) between a top-K teacher and student logits, averaged over valid rows.

    beta KL(T||M) + (1-beta) KL(S||M) on the bins of ``tail``, M = beta T + (1-beta) S; natural logs, >= 0; GKD
    (arXiv:2306.13649). Approximates the dense value: "bucket" is a lower bound of it, "renormalise" is neither a bound
    nor monotone in K.

    Args:
        student_logits: [N, V] or [B, T, V].
        teacher: The same rows: TopK, a sequence of TopK (padded with holes to [B, T]), or SparseTeacher.
        mask: bool [N] or [B, T], True = valid; None = all. Holes are also masked, and do not count.
        beta: Mixture weight of the teacher.
        tail: "bucket" (K + 1 bins) or "renormalise" (conditionals on the list).
        temperature: Only with "renormalise": for a bucket, the tempered tail mass would need the whole vocabulary.
        k: Use only the k most probable entries; the others count as tail.
        row_weight: Detached factor of each row's divergence, e.g. SDPO's truncated importance ratio; None = 1.
        reduction: "mean" and "batchmean" divide by the valid rows; "sum"; "none" keeps the shape, 0 at masked places.
        num_tokens: Divide by this instead of the valid rows of this batch.

    Returns:
        A scalar, or the mask's shape for reduction "none".
    """
    check_sparse_options(beta, tail, temperature)
    check_logits(student_logits=student_logits)
    rows, used = select_teacher(teacher, mask, student_logits.shape[:-1], student_logits, k)
    factor = select_weight(row_weight, used, student_logits)
    logp, _ = gather_logprobs(student_logits[used], rows.ids)
    per_row = factor * divergence(*bins(logp, rows, tail, temperature), beta)
    return reduce_tokens(per_row, used, reduction, num_tokens)


@disable_compile
def fused_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    k: int | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute ``sparse_divergence_loss`` from the last hidden states and the head, without N x V logits.

    beta KL(T||M) + (1-beta) KL(S||M) on the bins of ``tail``, natural logs, >= 0, to be minimised (GKD,
    arXiv:2306.13649); the same values as from logits, up to rounding. Masked rows and holes are dropped before the
    head. "bucket" computes its gradients in the forward pass, in chunks of rows; "renormalise" computes only the K
    logits of each row. In bf16, logits and gradients are rounded to bf16, and sums are float32, except dW of up to 16
    row chunks (error 0.3 %, against 0.15 % for one rounding; beyond 16, dW is summed in float32, which takes 4 bytes
    per weight).

    Args:
        hidden: [N, H] or [B, T, H].
        weight: lm_head weight [V, H]; may be frozen or tied.
        teacher: The same rows.
        mask: bool, True = valid; None = all.
        bias: [V] or None.
        beta: Mixture weight of the teacher.
        tail: "bucket" or "renormalise".
        temperature: Only with "renormalise".
        k: Use only the k most probable entries.
        row_weight: Detached factor of each row's divergence; None = 1.
        reduction: "mean" or "sum".
        num_tokens: Divide by this instead of the valid rows of this batch.
        chunk: Rows at a time; chosen by size when None.

    Returns:
        A scalar.
    """
    check_sparse_options(beta, tail, temperature)
    check_logits(hidden=hidden, weight=weight)
    rows, used = select_teacher(teacher, mask, hidden.shape[:-1], hidden, k)
    picked, factor = hidden[used], select_weight(row_weight, used, hidden)
    if tail == "renormalise":
        z = subset_logits(picked, weight, rows.ids, bias=bias)
        per_row = factor * divergence(*bins(z, rows, tail, temperature), beta)
        return reduce_tokens(per_row, used, reduction, num_tokens)

    def row_loss(logp: Tensor, lse: Tensor, part: slice) -> Tensor:  # noqa: ARG001 - the protocol's argument
        return factor[part] * divergence(*bins(logp, rows.rows(part), tail, temperature), beta)

    total = fused_row_loss(picked, weight, rows.ids, row_loss, bias=bias, chunk=chunk)
    return scale_total(total, int(used.sum()), reduction, num_tokens)


def bins(student_logp: Tensor, rows: SparseTeacher, tail: Tail, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Build two complete distributions: (teacher, student) logprobs, [N, K], or [N, K+1] with the tail bucket.

    Args:
        student_logp: [N, K], exact logprobs at the teacher's ids (for "renormalise", logits are enough).
        rows: The teacher's rows.
        tail: "bucket" or "renormalise".
        temperature: For "renormalise".
    """
    student = student_logp.masked_fill(~rows.listed, -math.inf)
    teacher = rows.logp.to(student.dtype)
    if tail == "renormalise":
        return log_softmax(teacher / temperature), log_softmax(student / temperature)
    # 1 - sum_k s_k loses digits: it and its gradient are float64, which costs little at [N, K]
    student_tail = log_tail_torch(to_widest(student)).to(student.dtype)
    return append_tail(teacher, rows.tail_logp.to(student.dtype)), append_tail(student, student_tail)


def select_teacher(
    teacher: Teacher,
    mask: Tensor | None,
    shape: torch.Size,
    like: Tensor,
    k: int | None,
    *,
    usable: Usable | None = None,
) -> tuple[SparseTeacher, Tensor]:
    """Select the teacher's rows that train; return them and the selection (valid, and usable: not a hole)."""
    sparse = flatten_teacher(teacher, shape, like.device, accumulator(like)).head(k)
    used: Tensor = boolean_mask(mask, shape, like.device)
    known = sparse.signal if usable is None else usable(sparse)
    used = torch.logical_and(used, known.reshape(shape))
    return sparse.rows(used.reshape(-1)), used


def select_weight(row_weight: Tensor | None, used: Tensor, like: Tensor) -> Tensor:
    """Select the detached factors of the rows that train, [N] in the loss's dtype; ones when None."""
    if row_weight is None:
        return torch.ones(int(used.sum()), dtype=accumulator(like), device=like.device)
    return select_known("row_weight", row_weight, used).to(accumulator(like))


def scale_total(total: Tensor, count: int, reduction: Reduction, num_tokens: float | Tensor | None) -> Tensor:
    """Scale a sum over rows: "sum" keeps it, "mean" divides by ``count`` rows (or num_tokens)."""
    if reduction not in ("mean", "sum") or (reduction == "sum" and num_tokens is not None):
        raise ConfigError("a fused loss takes reduction mean, or sum without num_tokens", got=reduction)
    return reduce_mean(total, count, num_tokens) if reduction == "mean" else total


def check_sparse_options(beta: float, tail: str, temperature: float) -> None:
    """Raise ConfigError if an option is out of range, or for a temperature with a tail bucket."""
    check_beta(beta)
    check_options(temperature=temperature, tail=tail)
    if tail == "bucket" and temperature != 1.0:
        raise ConfigError(
            "a tail bucket cannot have a temperature here: its mass would need the whole vocabulary",
            got=f"temperature {temperature}",
            hint="let the server apply the temperature, or use tail='renormalise'",
        )
