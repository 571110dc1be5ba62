"""Baselines, which reduce the variance of an advantage, and returns, which add later positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from topkd.topk.errors import ConfigError
from topkd.topk.inputs import check_floor, float64, logp64
from topkd.topk.maths.divergence import check_rows, find_silent_rows, kl_terms, log_mixture
from topkd.topk.maths.mass import LOG_MASS_CLAMP, check_mass, log_tail
from topkd.topk.maths.pairs import align_scores, union_bins
from topkd.topk.maths.scalars import check_beta, check_fraction
from topkd.topk.types import Float64, TopK

_LEAST_TAIL = np.log(-np.expm1(LOG_MASS_CLAMP))  # 1e-7, as on the student's side


def value_baseline(
    teacher_logp: ArrayLike, student_logp: ArrayLike, beta: float, *, teacher_tail_logp: ArrayLike | None = None
) -> Float64:
    """Compute the mean advantage of a position, E over y ~ S of A(y), from K shared ids and one tail bin.

    Subtract it from ``gjs_advantage``: it does not depend on y, so it changes the variance and nothing else::

        0 < beta < 1   -(1-beta) KL(S||M)      beta = 1   -KL(S||T)      beta = 0   0

    Natural log; always <= 0 (vOPD, arXiv:2605.07865, for beta = 1).
    Exact for K = V. For K < V the tail counts as one bin: a weaker baseline, but still no bias.

    Args:
        teacher_logp: [..., K].
        student_logp: [..., K], at the same ids.
        beta: Mixture weight of the teacher, in [0, 1].
        teacher_tail_logp: [...], log of the teacher's mass outside the list from unrounded values (``TopK.tail_logp``);
            None or NaN means 1 minus the listed mass.

    Returns:
        float64 [...]; NaN for a row with no finite entry on a side, and -inf at beta = 1 where the teacher gives
        probability 0 to one of the student's tokens.
    """
    beta = check_beta(beta)
    teacher, student = check_rows(teacher_logp, student_logp)
    check_mass("teacher_logp", teacher)
    check_mass("student_logp", student)
    silent = find_silent_rows(teacher, student)
    tail = log_tail(teacher)
    if teacher_tail_logp is not None:
        stored = logp64("teacher_tail_logp", teacher_tail_logp)
        if stored.shape != tail.shape:
            raise ConfigError("value_baseline: teacher_tail_logp must be [...]", got=stored.shape, expected=tail.shape)
        tail = np.where(np.isnan(stored), tail, np.maximum(stored, _LEAST_TAIL))
    teacher = np.concatenate([teacher, tail[..., None]], axis=-1)
    student = np.concatenate([student, log_tail(student)[..., None]], axis=-1)
    return np.where(silent, np.nan, _mean_advantage(teacher, student, beta))


def topk_value_baseline(teacher: TopK, student: TopK, beta: float, *, floor: float = -20.0) -> Float64:
    """Compute ``value_baseline`` from two lists of different ids, on the bins of ``topk_gjs(missing="union_tail")``.

    Natural log, <= 0; subtract it from the advantage (vOPD, arXiv:2605.07865). The value is approximate (missing ids
    get an estimated probability). It does not depend on the sampled token, so subtracting it leaves the gradient's mean
    unchanged.

    Returns:
        float64 [R]; NaN = no signal.
    """
    beta, floor = check_beta(beta), check_floor("topk_value_baseline: floor", floor)
    pair = align_scores(teacher, student)
    teacher_bins, student_bins = union_bins(pair, floor)
    return np.where(pair.signal, _mean_advantage(teacher_bins, student_bins, beta), np.nan)


def discounted_return(
    advantage: ArrayLike | None,
    divergence: ArrayLike,
    gamma: float,
    *,
    lengths: ArrayLike | None = None,
) -> Float64:
    """Compute the return of each token: A_t + sum_{j>t} gamma^(j-t) (-D_j).

    Later positions enter with their discounted *divergences*, never with their advantages (the expectation of A is -D
    only at beta = 1). Sign: larger is better. Exact; natural log; derived in docs/math.md.

    Args:
        advantage: [N] advantage of each token, or None for the part from later positions alone.
        divergence: [N] divergence D at each position, >= 0; a NaN makes the returns before it in its sequence NaN.
        gamma: Discount in [0, 1].
        lengths: Token counts of the sequences that follow one another in [N]; None = one sequence.

    Returns:
        float64 [N].

    Raises:
        ConfigError: ``advantage=None`` at gamma = 0: nothing then depends on the sampled token, and the expected policy
            gradient is zero.
    """
    gamma = check_fraction("gamma", gamma)
    values = float64("divergence", divergence)
    if values.ndim != 1:
        raise ConfigError("discounted_return: divergence must be [N]", got=values.shape)
    if advantage is None:
        if gamma == 0.0:
            raise ConfigError(
                "a state-only advantage at gamma 0 has no gradient: D_t does not depend on the sampled token",
                hint="pass an advantage (gjs_advantage) or gamma > 0",
            )
        own = np.zeros_like(values)
    else:
        own = float64("advantage", advantage)
    if own.shape != values.shape:
        raise ConfigError("advantage and divergence differ in shape", got=f"{own.shape} and {values.shape}")
    left = _steps_left(values.size, lengths)
    return own + (gamma * _following(_discounted_sums(-values, gamma, left), left) if gamma > 0.0 else 0.0)


def _mean_advantage(teacher: Float64, student: Float64, beta: float) -> Float64:
    if beta == 0.0:
        return np.where(np.isnan(teacher + student).any(axis=-1), np.nan, 0.0)
    if beta == 1.0:
        return np.asarray(np.minimum(-kl_terms(student, teacher).sum(axis=-1), 0.0))
    terms = kl_terms(student, log_mixture(teacher, student, beta))
    return np.asarray(np.minimum(-(1.0 - beta) * terms.sum(axis=-1), 0.0))


def _steps_left(size: int, lengths: ArrayLike | None) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Count, for each position, the later positions in its own sequence."""
    values = float64("lengths", [size] if lengths is None else lengths)
    counts = values.astype(np.int64)
    if (values != counts).any() or counts.ndim != 1 or (counts < 0).any() or counts.sum() != size:
        raise ConfigError(
            "lengths must be the token counts of the sequences", got=values.tolist(), expected=f"sum {size}"
        )
    return np.asarray(np.repeat(np.cumsum(counts), counts) - 1 - np.arange(size))


def _discounted_sums(values: Float64, gamma: float, left: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Float64:
    """Compute sum_{j>=t} gamma^(j-t) x_j within each sequence, by doubling: log2(longest length) passes over [N]."""
    total, stride = values.copy(), 1
    while stride <= left.max(initial=0):
        reach = np.flatnonzero(left >= stride)
        step = np.zeros_like(total)
        step[reach] = gamma**stride * total[reach + stride]
        total, stride = total + step, 2 * stride
    return total


def _following(values: Float64, left: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Float64:
    shifted = np.zeros_like(values)
    inside = np.flatnonzero(left >= 1)
    shifted[inside] = values[inside + 1]
    return shifted
