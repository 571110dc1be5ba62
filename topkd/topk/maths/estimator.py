"""The top-K policy gradient with a sampled tail: exact weights for log s at K ids and at the realised token.

A is the set of the K ids in the teacher's list (or any set that does not depend on the sampled token y); natural log;
beta is the teacher's weight in the mixture. The learner multiplies these *detached* weights with log s, and minimises
minus their sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.topk.errors import ConfigError
from topkd.topk.inputs import check_scores, float64, logp64, result_dtype, to_dtype
from topkd.topk.maths.advantages import advantage64
from topkd.topk.maths.mass import check_mass
from topkd.topk.maths.scalars import check_beta, check_lam
from topkd.topk.types import Bool, Float64, TopK

EMPTY_TAIL = 1e-6  # below this a tail mass is rounding, and a ratio of two is noise
_LEAST_TAIL = 1e-7


def topk_weights(
    teacher: TopK,
    student_logp_at_ids: ArrayLike,
    student_logp_actual: ArrayLike,
    *,
    beta: float,
    lam: float,
    is_weight: ArrayLike | None = None,
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Compute weights w: E over y ~ S of [sum_A w_v grad log s(v) + w_y grad log s(y)] is -grad of a divergence.

    With g the advantage of ``gjs_advantage`` and g_o the same formula at the two tail masses t_o = 1 - sum_A t and
    s_o = 1 - sum_A s (clamped at 1e-7)::

        w_v = s(v) (g(v) - g_o)                      v in A
        w_y = lam * rho * (g(y) - g_o)               y not in A, else 0;   rho = is_weight, 1 on-policy

    lam = 1: exactly -grad GJS_beta(T, S), for every K and any A. lam = 0: exactly -grad of the tail-bucket divergence
    on A. In between: -grad[(1-lam) bucket + lam dense]. Sign: ascend on sum w log s (the loss is minus that). The only
    approximation is the gate: where t_o or s_o is below 1e-6 (``gated_rows``), g_o and w_y are 0. Natural logs; the
    divergence is GKD's (arXiv:2306.13649), the estimator this library's (docs/math.md).

    Args:
        teacher: R rows. A is ``teacher.ids`` without pads; it must not contain y *because* y was sampled.
            ``tail_logp``, where known, gives t_o.
        student_logp_at_ids: [R, K] exact log s at ``teacher.ids`` (any value at pads).
        student_logp_actual: [R] exact log s(y), y = ``teacher.actual_ids``.
        beta: Mixture weight of the teacher, in [0, 1].
        lam: Weight of the sampled tail, in [0, 1].
        is_weight: [R] importance ratio s(y)/behaviour(y) of the realised token, already truncated; None = 1.

    Returns:
        ``(w_ids [R, K], w_actual [R])``, float32 when the student's logprobs are, else float64. Pads have weight 0. At
        beta = 1 listed ids with t = 0 also have weight 0: log t is not finite there, and they are part of the tail. NaN
        = no signal, to be masked: both weights for a row without a list or with an unknown student logprob;
        ``w_actual``, for lam > 0, for a realised token outside A that is unknown, has s = 0, or has t = 0 at beta = 1.
    """
    beta, lam = check_beta(beta), check_lam(lam)
    check_scores(teacher=teacher)
    member = _members(teacher, beta)
    known = _student(teacher, student_logp_at_ids)
    student = np.where(member, known, -np.inf)
    actual, ratio = _sampled(teacher.rows, student_logp_actual, is_weight)
    teacher_tail, student_tail, gated = _tails(teacher, student)
    baseline = np.where(gated, 0.0, advantage64(np.log(teacher_tail) - np.log(student_tail), beta))
    at_ids = teacher.logp.astype(np.float64)
    weights = np.where(member, weighted_advantage(at_ids, student, beta) - np.exp(student) * baseline[:, None], 0.0)
    inside = ((teacher.ids == teacher.actual_ids[:, None]) & member).any(axis=1)
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isneginf(actual), np.nan, teacher.actual_logp.astype(np.float64) - actual)
    tail = lam * ratio * (advantage64(difference, beta) - baseline)
    tail = np.where(teacher.actual_ids < 0, np.nan, tail)
    tail = np.where(inside | gated | (lam == 0.0), 0.0, tail)
    hole = ~teacher.signal if teacher.k else np.zeros(teacher.rows, dtype=np.bool_)
    hole = hole | np.isnan(known).any(axis=1)
    dtype = result_dtype(student_logp_at_ids, student_logp_actual)
    return (
        to_dtype(np.where(hole[:, None], np.nan, weights), dtype),
        to_dtype(np.where(hole, np.nan, tail), dtype),
    )


def gated_rows(teacher: TopK, student_logp_at_ids: ArrayLike, *, beta: float = 0.5) -> Bool:
    """Find the rows, bool [R], whose tail term ``topk_weights`` drops: t_o or s_o is below 1e-6, zero up to rounding.

    t_o = 1 - sum_A t (the stored tail where it is known), s_o = 1 - sum_A s, from natural logs. Report their share: on
    such rows the estimator uses only the listed ids.
    """
    check_scores(teacher=teacher)
    student = np.where(_members(teacher, check_beta(beta)), _student(teacher, student_logp_at_ids), -np.inf)
    return _tails(teacher, student)[2]


def _members(teacher: TopK, beta: float) -> Bool:
    """Find the ids of A, bool [R, K]; at beta = 1 ids with t = 0 count as tail, which is exact too."""
    return teacher.listed & ~np.isneginf(teacher.logp) if beta == 1.0 else teacher.listed


def weighted_advantage(teacher: Float64, student: Float64, beta: float) -> Float64:
    """Compute s g(t, s) elementwise, with its limit at s = 0: t for beta = 0, else 0. NaN for t = 0 at beta = 1."""
    probability = np.exp(student)
    if beta == 0.0:
        return np.asarray(np.exp(teacher) - probability)
    with np.errstate(invalid="ignore", over="ignore"):
        value = probability * advantage64(teacher - student, beta)
    return np.where(np.isneginf(student) & ~np.isnan(teacher), 0.0, value)


def _sampled(rows: int, student_logp_actual: ArrayLike, is_weight: ArrayLike | None) -> tuple[Float64, Float64]:
    """Check the realised tokens' logprobs and importance ratios; float64 [R] (or one ratio for all)."""
    actual = logp64("student_logp_actual", student_logp_actual)
    ratio = float64("is_weight", 1.0 if is_weight is None else is_weight)
    if (ratio < 0.0).any() or np.isinf(ratio).any():
        raise ConfigError("is_weight: not an importance ratio", got=ratio.min(), expected="0 <= ratio < inf")
    if actual.shape != (rows,) or (ratio.ndim and ratio.shape != (rows,)):
        raise ConfigError(
            "topk_weights: student_logp_actual and is_weight must be [R]",
            got=f"{actual.shape} and {ratio.shape}",
            expected=(rows,),
        )
    return actual, ratio


def _student(teacher: TopK, student_logp_at_ids: ArrayLike) -> Float64:
    """Check the student's logprobs at the teacher's ids; float64, -inf at pads."""
    values = float64("student_logp_at_ids", student_logp_at_ids)
    if values.shape != teacher.ids.shape:
        raise ConfigError("student_logp_at_ids: wrong shape", got=values.shape, expected=teacher.ids.shape)
    student = logp64("student_logp_at_ids", np.where(teacher.listed, values, -np.inf))
    check_mass("student_logp_at_ids", student)
    return student


def _tails(teacher: TopK, student: Float64) -> tuple[Float64, Float64, Bool]:
    """Compute t_o, s_o and whether one of them is zero up to rounding, each [R]."""
    teacher_tail = np.maximum(teacher.tail_mass(), _LEAST_TAIL)
    student_tail = np.maximum(1.0 - np.exp(student).sum(axis=1), _LEAST_TAIL)
    return teacher_tail, student_tail, np.asarray((teacher_tail < EMPTY_TAIL) | (student_tail < EMPTY_TAIL))
