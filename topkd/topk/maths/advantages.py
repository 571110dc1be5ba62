"""Advantages and KL estimates of sampled tokens, each from its two scalar logprobs.

Convention everywhere: natural logs; ``teacher_logp`` = log t(y), ``student_logp`` = log s(y) of the *realised* token y,
both exact; NaN = unknown, and stays NaN (mask it). A positive advantage makes y more likely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.topk.inputs import logp_pair, result_dtype, to_dtype
from topkd.topk.maths.scalars import check_beta
from topkd.topk.types import Float64


def scalar_kl_advantage(teacher_logp: ArrayLike, student_logp: ArrayLike) -> NDArray[np.floating]:
    """Compute the reverse-KL advantage of each realised token: A = log t(y) - log s(y), natural log.

    Sign: E over y ~ S of A is -KL(S||T), and E[A grad log s(y)] = -grad KL(S||T) exactly; A > 0 where the teacher's
    probability of y is larger than the student's. Thinking Machines, "On-Policy Distillation" (2025). Exact.

    Args:
        teacher_logp: Exact log t(y), any shape; NaN = unknown. -inf (teacher probability 0) has no finite advantage.
        student_logp: Exact log s(y), same shape.

    Returns:
        A of the same shape (float32 for float32 input, else float64); NaN where either side is unknown or -inf.
    """
    return gjs_advantage(teacher_logp, student_logp, 1.0)


def forward_kl_advantage(teacher_logp: ArrayLike, student_logp: ArrayLike) -> NDArray[np.floating]:
    """Compute the forward-KL advantage of each realised token: A = t(y)/s(y) - 1.

    Sign: E over y ~ S of A is 0, and E[A grad log s(y)] = -grad KL(T||S) exactly. A >= -1 and unbounded above, so its
    variance is large where the student is unsure. Arguments are natural logs; equals ``gjs_advantage`` at beta = 0
    (GKD, arXiv:2306.13649). Exact.

    Returns:
        A of the shape of the arguments; NaN where either side is unknown or the student's logprob is -inf.
    """
    return gjs_advantage(teacher_logp, student_logp, 0.0)


def gjs_advantage(teacher_logp: ArrayLike, student_logp: ArrayLike, beta: float) -> NDArray[np.floating]:
    """Compute the generalised-JSD advantage of each realised token, exactly, from its two scalar logprobs.

    With m = beta t + (1-beta) s, natural logs::

        0 < beta < 1   A = (1-beta) log(m/s) = (1-beta) log(beta exp(log t - log s) + 1 - beta)
        beta = 1       A = log t - log s                       (reverse KL; ``scalar_kl_advantage``)
        beta = 0       A = t/s - 1                             (forward KL; unbounded above)

    Sign: E over y ~ S of [A grad log s(y)] = -grad GJS_beta(T, S) exactly; sign(A) = sign(log t - log s);
    A >= (1-beta) log(1-beta) for 0 < beta < 1. The divergence *value* is never an advantage: its policy gradient is
    zero in expectation. The divergence is GKD's (arXiv:2306.13649). At beta = 0 and 1 A is not the limit of the formula
    between them (A/beta -> t/s - 1 as beta -> 0).

    Args:
        teacher_logp: Exact log t(y), any shape; NaN = unknown; -inf = teacher probability 0.
        student_logp: Exact log s(y), same shape.
        beta: Mixture weight of the teacher, in [0, 1].

    Returns:
        A of the same shape (float32 for float32 input, else float64). NaN where a side is unknown, where the student's
        logprob is -inf (it cannot have sampled y), and at beta = 1 where the teacher's is -inf: mask and count those.
    """
    beta = check_beta(beta)
    teacher, student = logp_pair(teacher_logp, student_logp)
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isneginf(student), np.nan, teacher - student)
    return to_dtype(advantage64(difference, beta), result_dtype(teacher_logp, student_logp))


def advantage64(difference: Float64, beta: float) -> Float64:
    """Compute the advantage from d = log t - log s, in float64 (see ``gjs_advantage``); beta is in range."""
    if beta == 1.0:
        return np.where(np.isneginf(difference), np.nan, difference)
    with np.errstate(over="ignore", invalid="ignore"):
        if beta == 0.0:
            return np.asarray(np.expm1(difference))
        # Near d = 0 log1p/expm1 keep all digits; elsewhere logaddexp neither overflows nor cancels.
        near = np.log1p(beta * np.expm1(np.clip(difference, -1.0, 1.0)))
        far = np.logaddexp(np.log(beta) + difference, np.log1p(-beta))
    return np.asarray((1.0 - beta) * np.where(np.abs(difference) <= 1.0, near, far))


def kl_k1(reference_logp: ArrayLike, student_logp: ArrayLike) -> NDArray[np.floating]:
    """Compute the k1 estimate of KL(S||R) at each sampled token: log s(y) - log r(y), natural log.

    Its mean over y ~ S is exactly KL(S||R), and it is the *negative* of ``scalar_kl_advantage(reference, student)``.
    Unbiased; it may be negative on a single token. Schulman, "Approximating KL divergence" (2020).

    Args:
        reference_logp: Exact log r(y), any shape (the teacher's, or a frozen reference's).
        student_logp: Exact log s(y) of the policy that sampled y, same shape.

    Returns:
        The same shape; NaN where a side is unknown; +inf where r(y) = 0.
    """
    reference, student = logp_pair(reference_logp, student_logp)
    with np.errstate(invalid="ignore"):
        value = np.where(np.isneginf(student), np.nan, student - reference)
    return to_dtype(value, result_dtype(reference_logp, student_logp))


def kl_k3(reference_logp: ArrayLike, student_logp: ArrayLike) -> NDArray[np.floating]:
    """Compute the k3 estimate of KL(S||R) at each sampled token: expm1(d) - d with d = log r(y) - log s(y).

    d is reference minus student: then every value is >= 0 and the mean over y ~ S is exactly KL(S||R). With d reversed
    it is still >= 0, but its mean is chi-squared minus KL, which is not the KL. Natural log; Schulman, "Approximating
    KL divergence" (2020).

    Returns:
        The same shape; NaN where a side is unknown; +inf where r(y) = 0.
    """
    reference, student = logp_pair(reference_logp, student_logp)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(np.isneginf(student), np.nan, reference - student)
        value = np.asarray(np.expm1(difference) - difference)
    return to_dtype(value, result_dtype(reference_logp, student_logp))
