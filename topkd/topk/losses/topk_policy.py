"""The top-K policy gradient with a sampled tail: analytic over the teacher's list, sampled outside it.

Per position, with A the listed ids, o all others (the tail), g the advantage (gjs_advantage), sg[x] = x detached::

    G = sum_{v in A} sg[s(v) (g(v) - g_o)] grad log s(v)  +  lam 1[y not in A] sg[r (g(y) - g_o)] grad log s(y)

Over y ~ S its expectation is exactly -grad[(1-lam) D_bucket + lam D]. At lam = 1 that is minus the gradient of the
full-vocabulary divergence, for every K; at lam = 0 minus that of the divergence of K + 1 bins. Natural logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, overload

import torch
from torch import Tensor

from topkd.topk.errors import ConfigError
from topkd.topk.losses.divergence import divergence
from topkd.topk.losses.jsd import append_tail
from topkd.topk.losses.policy import importance_ratio
from topkd.topk.losses.teacher import SparseTeacher, Teacher, flatten_teacher
from topkd.topk.losses.tokens import (
    Reduction,
    boolean_mask,
    check_tensors,
    reduce_tokens,
    select_behavior,
    to_widest,
    upcast,
)
from topkd.topk.maths.scalars import check_above_zero, check_beta, check_lam
from topkd.topk.types import MASS_TOLERANCE

TAIL_GATE = 1e-6  # below this the tail's advantage is a quotient of two rounding errors
_TAIL_CLAMP = 1e-7
_HALF_MASS_TOLERANCE = 5e-2  # bf16 rounds a logprob by 2**-9 of itself


@dataclass(frozen=True, slots=True)
class SupportWeights:
    """Detached float64 coefficients of log s, and the values that they come from; N rows.

    Attributes:
        ids: [N, K], coefficient of log s at the listed ids (0 at pads).
        actual: [N], coefficient of log s(y); 0 where y is listed.
        gated: bool [N], one side's tail is zero up to rounding.
        in_support: bool [N], y is listed.
        excluded: bool [N], y outside the list with t(y) = 0 at beta = 1: no finite advantage.
        teacher_tail: [N], t_o, the teacher's mass outside the list.
        student_tail: [N], s_o, the student's.
    """

    ids: Tensor
    actual: Tensor
    gated: Tensor
    in_support: Tensor
    excluded: Tensor
    teacher_tail: Tensor
    student_tail: Tensor

    @classmethod
    def concat(cls, parts: Sequence[SupportWeights]) -> SupportWeights:
        """Concatenate the rows of several chunks."""
        if not parts:
            none = torch.zeros(0)
            return cls(none, none, none.bool(), none.bool(), none.bool(), none, none)
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def advantage(log_ratio: Tensor, beta: float) -> Tensor:
    """Compute g from log t - log s: (1-beta) log(beta t/s + 1 - beta); beta 1: log t/s; beta 0: t/s - 1."""
    if beta == 1.0:
        return log_ratio
    if beta == 0.0:
        return torch.expm1(log_ratio)
    other = torch.full_like(log_ratio, math.log1p(-beta))
    return (1.0 - beta) * torch.logaddexp(log_ratio + math.log(beta), other)


def compute_support_weights(
    student_logp_at_ids: Tensor,
    student_logp_actual: Tensor,
    teacher: SparseTeacher,
    *,
    beta: float,
    lam: float,
    behavior_logp: Tensor | None = None,
    cap: float | None = None,
) -> SupportWeights:
    """Compute the estimator's coefficients for rows with a signal; float64, detached."""
    ls, lt = to_widest(student_logp_at_ids.detach()), to_widest(teacher.logp)
    s_y, t_y = to_widest(student_logp_actual.detach()), to_widest(teacher.actual_logp)
    # at beta = 1 an id with t = 0 has no finite advantage: it counts as tail, which is exact too
    member = teacher.listed & ~torch.isneginf(lt) if beta == 1.0 else teacher.listed
    used = member & ~torch.isneginf(ls)
    s = torch.where(used, ls, -math.inf).exp()
    ratio = torch.where(used, lt - torch.where(used, ls, 0.0), 0.0)
    # s g; at beta = 0 it is computed as t - s, because t/s would overflow
    head = torch.where(member, lt, -math.inf).exp() - s if beta == 0.0 else s * advantage(ratio, beta)
    t_o, s_o = to_widest(teacher.tail_logp).exp().clamp(min=_TAIL_CLAMP), (1.0 - s.sum(-1)).clamp(min=_TAIL_CLAMP)
    gated = (t_o < TAIL_GATE) | (s_o < TAIL_GATE)
    g_o = torch.where(gated, 0.0, advantage(t_o.log() - s_o.log(), beta))
    # where s = 0 the weight is the limit: t at beta = 0, else 0
    w_ids = torch.where(member if beta == 0.0 else used, head - s * g_o[:, None], 0.0)
    in_support = (member & (teacher.ids == teacher.actual_ids[:, None])).any(-1)
    outside = ~in_support & ~gated & ~torch.isneginf(s_y)
    excluded = outside & torch.isneginf(t_y) if beta == 1.0 else torch.zeros_like(gated)
    sampled = outside & ~excluded & (lam > 0.0)
    g_y = advantage(torch.where(sampled, t_y, 0.0) - torch.where(sampled, s_y, 0.0), beta)
    w_actual = torch.where(sampled, lam * (g_y - g_o), 0.0)
    if behavior_logp is not None:
        weight = importance_ratio(s_y, to_widest(behavior_logp.detach()))
        w_actual = w_actual * (weight if cap is None else weight.clamp(max=cap))
    return SupportWeights(w_ids, w_actual, gated, in_support, excluded, t_o, s_o)


class _ZeroAtMinusInf(torch.autograd.Function):
    """log s with 0 in place of -inf but the gradient of log s: at beta = 0 an id with s = 0 still has the weight t."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor) -> Tensor:  # noqa: ARG004 - nothing to keep
        return logp.masked_fill(torch.isneginf(logp), 0.0)

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor) -> Tensor:  # noqa: ARG004
        return d_logp


def compute_row_losses(student_logp_at_ids: Tensor, student_logp_actual: Tensor, weights: SupportWeights) -> Tensor:
    """Compute -(sum_k w_k log s_k + w_y log s_y), [N]; entries of weight zero are never read.

    An id with s = 0 and a weight (beta = 0) has a gradient, but its infinite term is left out of the value.
    """
    at_ids: Tensor = _ZeroAtMinusInf.apply(  # type: ignore[no-untyped-call]
        torch.where(weights.ids != 0, student_logp_at_ids, 0.0)
    )
    actual = torch.where(weights.actual != 0, student_logp_actual, 0.0)
    dtype = student_logp_at_ids.dtype
    return -((weights.ids.to(dtype) * at_ids).sum(-1) + weights.actual.to(dtype) * actual)


def find_usable_rows(teacher: SparseTeacher, lam: float) -> Tensor:
    """Find rows with a signal and, when lam > 0, a known realised token: bool [N].

    K = 0 is the empty support A, which gives the plain sampled-token estimator; with K > 0 an empty row is a hole.
    """
    signal = teacher.signal if teacher.ids.shape[-1] else torch.ones_like(teacher.tail_logp, dtype=torch.bool)
    if lam == 0.0:
        return signal
    return signal & (teacher.actual_ids >= 0) & ~torch.isnan(teacher.actual_logp)


def summarise_estimator(weights: SupportWeights, bucket: Tensor, masked_rows: int) -> dict[str, float]:
    """Summarise the rows that were used: means, and counts of gated, excluded or masked rows."""
    count = max(weights.actual.shape[0], 1)
    return {
        "gated_rows": float(weights.gated.sum()),
        "excluded_tokens": float(weights.excluded.sum()),
        "masked_rows": float(masked_rows),
        "in_support": float(weights.in_support.sum()) / count,
        "teacher_tail": float(weights.teacher_tail.sum()) / count,
        "student_tail": float(weights.student_tail.sum()) / count,
        "divergence_bucket": float(bucket.sum()) / count,
    }


@overload
def topk_policy_gradient_loss(
    student_logp_at_ids: Tensor,
    student_logp_actual: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    lam: float = 0.3,
    behavior_logp: Tensor | None = None,
    cap: float | None = 2.0,
    k: int | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...
@overload
def topk_policy_gradient_loss(
    student_logp_at_ids: Tensor,
    student_logp_actual: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    lam: float = 0.3,
    behavior_logp: Tensor | None = None,
    cap: float | None = 2.0,
    k: int | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, dict[str, float]]: ...
def topk_policy_gradient_loss(
    student_logp_at_ids: Tensor,
    student_logp_actual: Tensor,
    teacher: Teacher,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    lam: float = 0.3,
    behavior_logp: Tensor | None = None,
    cap: float | None = 2.0,
    k: int | None = None,
    reduction: Reduction = "mean",
    num_tokens: float | Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, float]]:
    """Compute the top-K policy gradient loss with a sampled tail; its value is a surrogate, only the gradient counts.

    lam = 1: E over y ~ S of the gradient is +grad GJS_beta(T, S) of the loss, exactly, for every K and support that was
    chosen without looking at y. lam < 1 replaces the divergence by (1-lam) D_bucket + lam D and lowers the variance.
    Rows whose tail is below 1e-6 on one side have no tail term, and are counted. Nothing is floored or renormalised.
    (Most trainers truncate the tail, at lam = 0; that diverges.) Natural logs; to be minimised. The identity is this
    library's; the divergence is GKD's (arXiv:2306.13649). At beta = 0 a listed id with s = 0 has the weight t, the
    limit of s (t/s - 1); its infinite term is left out of the value.

    Args:
        student_logp_at_ids: Exact log s at the teacher's ids, [N, K] or [B, T, K]; values at pads are not used.
        student_logp_actual: Exact log s(y), [N] or [B, T].
        teacher: The same rows: TopK, a sequence of TopK, or SparseTeacher.
        mask: bool [N] or [B, T], True = valid; None = all. Holes, and for lam > 0 rows whose realised token is unknown,
            are also masked, and do not count in the mean.
        beta: Mixture weight of the teacher (0 forward KL, 1 reverse KL).
        lam: Weight of the sampled tail, in [0, 1].
        behavior_logp: Logprob of y under the policy it was sampled from; None = on-policy. Only the sampled term needs
            it.
        cap: Upper bound of that ratio (detached; biased above it); None = none.
        k: Number of entries requested from the server; further ones (its extra realised token) are not in the support.
        reduction: "mean" divides by the valid rows; "sum" does not.
        num_tokens: Divide by this instead.
        return_metrics: Also return counts (gated, excluded, masked rows) and means (tails, y in support, D_bucket).

    Returns:
        A scalar, or (scalar, metrics).
    """
    check_beta(beta)
    check_lam(lam)
    check_above_zero(cap=cap)
    check_tensors(student_logp_at_ids=student_logp_at_ids, student_logp_actual=student_logp_actual)
    shape = student_logp_actual.shape
    if student_logp_at_ids.shape[:-1] != shape:
        raise ConfigError(
            "student_logp_at_ids must have student_logp_actual's shape, and K",
            got=tuple(student_logp_at_ids.shape),
            expected=(*shape, "K"),
        )
    at_ids = upcast(student_logp_at_ids.flatten(0, -2) if student_logp_at_ids.dim() > 1 else student_logp_at_ids[None])
    sparse = flatten_teacher(teacher, shape, at_ids.device, at_ids.dtype)
    if sparse.ids.shape[-1] != at_ids.shape[-1]:
        raise ConfigError("student and teacher differ in K", got=at_ids.shape[-1], expected=sparse.ids.shape[-1])
    sparse = sparse.head(k)
    valid = boolean_mask(mask, shape, at_ids.device).reshape(-1)
    used = valid & find_usable_rows(sparse, lam)
    rows = sparse.rows(used)
    at_ids, actual = at_ids[used][:, : rows.ids.shape[-1]], upcast(student_logp_actual.reshape(-1)[used])
    check_mass_torch(at_ids.masked_fill(~rows.listed, -math.inf), student_logp_at_ids.dtype)
    behavior = select_behavior(behavior_logp if lam > 0.0 else None, used.reshape(shape))
    weights = compute_support_weights(at_ids, actual, rows, beta=beta, lam=lam, behavior_logp=behavior, cap=cap)
    loss = reduce_tokens(compute_row_losses(at_ids, actual, weights), used, reduction, num_tokens)
    if not return_metrics:
        return loss
    return loss, summarise_estimator(weights, compute_bucket_divergence(at_ids, rows, beta), int((valid & ~used).sum()))


def check_mass_torch(student_logp_at_ids: Tensor, dtype: torch.dtype) -> None:
    """Raise ConfigError if a row sums to more than 1: logits in place of logprobs would pass every other check."""
    if torch.compiler.is_compiling():
        return
    mass = to_widest(student_logp_at_ids.detach()).exp().sum(-1)
    limit = 1.0 + (MASS_TOLERANCE if dtype in (torch.float32, torch.float64) else _HALF_MASS_TOLERANCE)
    if bool((mass > limit).any()):
        raise ConfigError(
            "student_logp_at_ids: mass above 1",
            where=f"row {int((mass > limit).nonzero()[0])} of those that train",
            got=f"{float(mass.nan_to_num(0.0).max()):.6g}",
            expected=f"<= {limit:g}",
            hint="pass natural-log probabilities (log_softmax of the whole vocabulary), not logits",
        )


def compute_bucket_divergence(student_logp_at_ids: Tensor, teacher: SparseTeacher, beta: float) -> Tensor:
    """Compute D_bucket of each row, [N], detached float64: a lower bound of the divergence, for the run log."""
    student = to_widest(torch.where(teacher.listed, student_logp_at_ids.detach(), -math.inf))
    tail = (1.0 - student.exp().sum(-1)).clamp(min=_TAIL_CLAMP).log()
    return divergence(
        append_tail(to_widest(teacher.logp), to_widest(teacher.tail_logp)), append_tail(student, tail), beta
    )
