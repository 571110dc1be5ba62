"""Divergences of two distributions with logprobs at the same ids: the whole vocabulary, or K shared ids.

beta is the mixture weight of the *teacher*: 0 is forward KL(T||S), 1 is reverse KL(S||T), natural log throughout.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from topkd.topk.errors import ConfigError
from topkd.topk.inputs import logp_pair
from topkd.topk.maths.mass import check_mass, log_mass, log_tail
from topkd.topk.maths.scalars import check_beta
from topkd.topk.types import Bool, Float64

DENSE_TOLERANCE = 1e-2  # half-precision rounding explains this distance of a dense row's mass from 1, but no more
Tail = Literal["bucket", "renormalise", "partial"]


def gjs(teacher_logp: ArrayLike, student_logp: ArrayLike, beta: float) -> Float64:
    """Compute the generalised Jensen-Shannon divergence over the last axis, in nats, always >= 0.

    With M = beta T + (1-beta) S::

        GJS_beta = beta KL(T||M) + (1-beta) KL(S||M)           0 < beta < 1,  <= H2(beta) <= log 2
        GJS_0    = KL(T||S)        GJS_1 = KL(S||T)            special-cased: discontinuous with the interior

    Agarwal et al., GKD (arXiv:2306.13649). Exact: nothing is truncated; 0 log 0 = 0; p > 0 against q = 0 gives +inf,
    only at beta = 0 and 1. Computed in float64.

    Args:
        teacher_logp: [..., V] full-vocabulary logprobs.
        student_logp: [..., V], same shape.
        beta: Mixture weight of the teacher, in [0, 1].

    Returns:
        float64 [...]; NaN for a row that holds a NaN or is all -inf on a side (no signal).
    """
    beta = check_beta(beta)
    teacher, student = check_rows(teacher_logp, student_logp)
    for name, logp in (("teacher_logp", teacher), ("student_logp", student)):
        mass = np.exp(logp).sum(axis=-1)
        wrong = (np.abs(mass - 1.0) > DENSE_TOLERANCE) & (mass > 0.0)
        if wrong.any():
            raise ConfigError(
                f"gjs: {name} is not a full distribution",
                where=f"row {np.argwhere(np.atleast_1d(wrong))[0].tolist()}",
                got=f"mass {np.atleast_1d(mass)[np.atleast_1d(wrong)][0]:.6g}",
                expected="1",
                hint="for top-K lists use shared_support_gjs or topk_gjs",
            )
    return np.where(
        find_silent_rows(teacher, student), np.nan, np.maximum(integrand(teacher, student, beta).sum(-1), 0.0)
    )


def shared_support_gjs(teacher_logp: ArrayLike, student_logp: ArrayLike, beta: float, tail: Tail = "bucket") -> Float64:
    """Compute GJS_beta on K shared ids, in nats: both sides have exact logprobs *of the same ids*.

    The divergence of ``gjs`` (arXiv:2306.13649) between fewer events; what is approximate depends on ``tail``.

    ``tail="bucket"``: the mass outside becomes one more event (bin) on each side, log(1 - mass) = log(-expm1(lse)) with
    lse clamped at -1e-7. Both distributions are exact on the K + 1 events, so 0 <= result <= dense; the result does not
    decrease with K for nested ids, and equals dense at K = V (up to the clamp). The default of SDPO and TRL.

    ``tail="renormalise"``: both sides are divided by their mass on the K ids. A divergence of the *conditional*
    distributions: it ignores that mass, is 0 for K = 1, and is neither a bound of dense nor monotone in K. OPSD's
    ``top_k``.

    ``tail="partial"``: the plain sum over the K ids. For 0 < beta < 1 it lies between 0 and the bucket's value (biased
    low); at beta = 0 or 1 it may be negative. Only for comparison.

    Args:
        teacher_logp: [..., K]; a missing or padded entry is -inf on both sides.
        student_logp: [..., K], at the same ids, same shape.
        beta: Mixture weight of the teacher, in [0, 1]: 0 forward KL(T||S), 1 reverse KL(S||T).
        tail: What happens to the mass outside the K ids.

    Returns:
        float64 [...]; NaN for a row that holds a NaN or has no finite entry on a side (no signal).
    """
    beta = check_beta(beta)
    teacher, student = check_rows(teacher_logp, student_logp)
    if tail not in ("bucket", "renormalise", "partial"):
        raise ConfigError("shared_support_gjs: unknown tail", got=repr(tail), expected="bucket, renormalise or partial")
    check_mass("teacher_logp", teacher)
    check_mass("student_logp", student)
    silent = find_silent_rows(teacher, student)
    if tail == "renormalise":
        with np.errstate(invalid="ignore"):
            teacher, student = teacher - log_mass(teacher)[..., None], student - log_mass(student)[..., None]
    total = integrand(teacher, student, beta).sum(axis=-1)
    if tail == "bucket":
        total = total + integrand(log_tail(teacher), log_tail(student), beta)
    if tail != "partial":
        total = np.maximum(total, 0.0)
    return np.where(silent, np.nan, total)


def integrand(teacher: Float64, student: Float64, beta: float) -> Float64:
    """Compute the summand of GJS_beta at each id, in float64.

    Never negative for 0 < beta < 1; may be negative at beta = 0 or 1.
    Also correct for an entry that is a sum over ids (the tail). NaN where either side is NaN.
    """
    if beta == 0.0:
        return kl_terms(teacher, student)
    if beta == 1.0:
        return kl_terms(student, teacher)
    mixture = log_mixture(teacher, student, beta)
    return beta * kl_terms(teacher, mixture) + (1.0 - beta) * kl_terms(student, mixture)


def log_mixture(teacher: Float64, student: Float64, beta: float) -> Float64:
    """Compute log m = log(beta t + (1-beta) s) for 0 < beta < 1, elementwise; NaN where either side is NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.logaddexp(teacher + np.log(beta), student + np.log1p(-beta)))


def kl_terms(logp: Float64, logq: Float64) -> Float64:
    """Compute p (log p - log q) at each id: 0 where p = 0, +inf where p > 0 = q, NaN where either is NaN."""
    empty = np.isneginf(logp) & ~np.isnan(logq)
    broken = np.isneginf(logq) & (logp > -np.inf)  # also where exp(logp) is 0 by rounding: 0 * inf would be nan
    with np.errstate(invalid="ignore"):
        return np.where(empty, 0.0, np.where(broken, np.inf, np.exp(logp) * (logp - logq)))


def check_rows(teacher_logp: ArrayLike, student_logp: ArrayLike) -> tuple[Float64, Float64]:
    """Return both sides as float64 of one shape [..., V]."""
    teacher, student = logp_pair(teacher_logp, student_logp)
    if teacher.ndim < 1 or teacher.shape != student.shape:
        raise ConfigError(
            "teacher_logp and student_logp must be [..., V] of one shape", got=f"{teacher.shape} and {student.shape}"
        )
    return teacher, student


def find_silent_rows(teacher: Float64, student: Float64) -> Bool:
    """Find the rows without a signal: all -inf on one side."""
    return np.asarray(np.isneginf(teacher).all(axis=-1) | np.isneginf(student).all(axis=-1))
