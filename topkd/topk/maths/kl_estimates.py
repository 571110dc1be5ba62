"""Estimates of a KL divergence from sampled tokens, with the sign of a KL."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.topk.inputs import logp_pair, result_dtype, to_dtype


def kl_k1(reference_logp: ArrayLike, student_logp: ArrayLike) -> NDArray[np.floating]:
    """The k1 estimate of KL(S||R) at each sampled token: log s(y) - log r(y), natural log.

    Its mean over y ~ S is exactly KL(S||R), and it is the *negative* of ``scalar_kl_advantage(reference, student)``.
    Unbiased, of either sign on a single token. Schulman, "Approximating KL divergence" (2020).

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
    """The k3 estimate of KL(S||R) at each sampled token: expm1(d) - d with d = log r(y) - log s(y).

    d is reference minus student: then every value is >= 0 and the mean over y ~ S is exactly KL(S||R). With d reversed
    it is still >= 0 and its mean is chi-squared minus KL, which is no estimate of anything asked for. Natural log;
    Schulman, "Approximating KL divergence" (2020).

    Returns:
        The same shape; NaN where a side is unknown; +inf where r(y) = 0.
    """
    reference, student = logp_pair(reference_logp, student_logp)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(np.isneginf(student), np.nan, reference - student)
        value = np.asarray(np.expm1(difference) - difference)
    return to_dtype(value, result_dtype(reference_logp, student_logp))
