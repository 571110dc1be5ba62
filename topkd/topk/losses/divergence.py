"""The integrands of GJS, forward and reverse KL on torch log-probabilities, safe at probability zero.

beta is the mixture weight of the teacher T: beta = 0 is forward KL(T||S), beta = 1 reverse KL(S||T), between them
GJS = beta KL(T||M) + (1-beta) KL(S||M) with M = beta T + (1-beta) S. The endpoints are defined separately, not as
limits, which are 0. Natural logs; the teacher is detached.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from topkd.topk.maths.scalars import check_beta

CLAMPED_LOG_MASS = -1e-7  # a listed mass above 1 - 1e-7 is rounding: log(1 - mass) would be noise or nan


def divergence_terms(teacher_logp: Tensor, student_logp: Tensor, beta: float) -> Tensor:
    """Compute the summands of the divergence, in the inputs' shape; they sum to it over the last axis.

    0 < beta < 1: beta t (log t - log m) + (1-beta) s (log s - log m), each >= 0.  beta = 0: t (log t - log s).
    beta = 1: s (log s - log t). A part is 0 where its own probability is zero; it is +inf only at the endpoints, where
    only the other probability is zero.

    Args:
        teacher_logp: Natural-log probabilities [..., V]; detached here.
        student_logp: Natural-log probabilities [..., V].
        beta: Mixture weight of the teacher, in [0, 1].
    """
    check_beta(beta)
    teacher_logp = teacher_logp.detach()
    teacher_has, student_has = ~torch.isneginf(teacher_logp), ~torch.isneginf(student_logp)  # nan stays nan
    # -inf is replaced before any arithmetic: a later where() would still give nan in the backward pass
    lt = torch.where(teacher_has, teacher_logp, 0.0)
    ls = torch.where(student_has, student_logp, 0.0)
    t, s = torch.where(teacher_has, lt.exp(), 0.0), torch.where(student_has, ls.exp(), 0.0)
    if beta == 0.0:
        return torch.where(teacher_has, torch.where(student_has, t * (lt - ls), math.inf), 0.0)
    if beta == 1.0:
        return torch.where(student_has, torch.where(teacher_has, s * (ls - lt), math.inf), 0.0)
    either = teacher_has | student_has
    log_teacher_part = torch.where(teacher_has, lt + math.log(beta), -math.inf)
    log_student_part = torch.where(student_has, ls + math.log1p(-beta), -math.inf)
    log_m = torch.logaddexp(torch.where(either, log_teacher_part, 0.0), torch.where(either, log_student_part, 0.0))
    terms = beta * t * (lt - log_m) + (1.0 - beta) * s * (ls - log_m)
    return torch.where(either, terms, 0.0)


def divergence(teacher_logp: Tensor, student_logp: Tensor, beta: float) -> Tensor:
    """Compute GJS_beta over the last axis (KL at the endpoints), >= 0, of two complete distributions.

    Rounding may leave a sum slightly below zero: the value is raised to 0, the gradient is kept.
    """
    return clamp_value(divergence_terms(teacher_logp, student_logp, beta).sum(-1))


def clamp_value(total: Tensor) -> Tensor:
    """Return max(total, 0) with the gradient of total: rounding near T = S must not remove a token's gradient."""
    return total + (-total).clamp(min=0.0).detach()


def log_softmax(logits: Tensor, *, dead: float = -math.inf) -> Tensor:
    """Compute log-softmax over the last axis; a row of -inf logits is filled with ``dead`` and gets no gradient.

    Such a row is not a distribution. With ``dead=math.nan`` its divergence is nan, which means "no signal", and never
    looks like a divergence of zero.
    """
    none = torch.isneginf(logits).all(-1, keepdim=True)
    return torch.log_softmax(torch.where(none, 0.0, logits), -1).masked_fill(none, dead)


def log_tail_torch(logp: Tensor) -> Tensor:
    """Compute the log tail mass log(1 - sum exp(logp)) over the last axis, as log(-expm1(min(lse, -1e-7)))."""
    return log1mexp(torch.logsumexp(logp, -1).clamp(max=CLAMPED_LOG_MASS))


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x < 0, with expm1 near 0 and log1p elsewhere."""
    near = x > -math.log(2.0)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
