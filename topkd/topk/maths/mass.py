"""Probability mass inside and outside a top-K list, without cancellation, and bounds of the entropy."""

from __future__ import annotations

import numpy as np

from topkd.topk.errors import ConfigError
from topkd.topk.inputs import check_scores
from topkd.topk.maths.scalars import check_integer
from topkd.topk.types import MASS_TOLERANCE, Float64, TopK

LOG_MASS_CLAMP = -1e-7  # largest log mass of a list: keeps log(1 - mass) finite, as published losses do


def log_mass(logp: Float64) -> Float64:
    """Compute log sum_k exp(logp_k) over the last axis; -inf for a row of -inf, NaN where an entry is NaN."""
    top = logp.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(logp - shift).sum(axis=-1)) + shift[..., 0])


def log_tail(logp: Float64, *, clamp: float = LOG_MASS_CLAMP) -> Float64:
    """Compute log(1 - sum_k exp(logp_k)) over the last axis as log(-expm1(min(lse, clamp))).

    At the default clamp the smallest tail is log(1e-7) = -16.1, independent of rounding in the list.
    """
    return np.asarray(np.log(-np.expm1(np.minimum(log_mass(logp), clamp))))


def check_mass(name: str, logp: Float64) -> None:
    """Refuse rows whose probabilities sum to more than 1 + 1e-3: they are not (part of) a distribution."""
    with np.errstate(over="ignore"):
        mass = np.atleast_1d(np.exp(logp).sum(axis=-1))
    if (mass > 1.0 + MASS_TOLERANCE).any():
        row = int(np.flatnonzero(mass > 1.0 + MASS_TOLERANCE)[0])
        raise ConfigError(
            f"{name}: mass above 1",
            where=f"row {row}",
            got=f"{mass.ravel()[row]:.6g}",
            expected=f"<= 1 + {MASS_TOLERANCE}",
            hint="pass natural-log probabilities of distinct ids",
        )


def entropy_bounds(teacher: TopK, vocab_size: int) -> tuple[Float64, Float64]:
    """Bound each row's entropy H(T) = -sum_v t log t from below and above, in nats.

    With h = -sum over the list of t log t and r the mass outside it::

        lo = h - r log r                     the rest as one event
        hi = h - r log(r / (V - K))          the rest spread evenly over the other V - K ids

    so lo <= H <= hi up to the rounding of the list. Used by entropy gates (arXiv:2603.07079): only where lo >= tau is
    the entropy surely at least tau.

    Args:
        teacher: R rows; ``tail_logp`` gives r where it is known, else 1 - mass.
        vocab_size: V, the size of the teacher's vocabulary.

    Returns:
        ``(lo, hi)``, float64 [R]; NaN for a row that lists nothing (no signal).
    """
    check_scores(teacher=teacher)
    vocab_size = check_integer("vocab_size", vocab_size)
    count = teacher.listed.sum(axis=1)
    if vocab_size < max(1, int(count.max(initial=0))) or (teacher.k and int(teacher.ids.max(initial=-1)) >= vocab_size):
        raise ConfigError(
            "entropy_bounds: vocab_size is smaller than the ids in the list",
            got=vocab_size,
            expected=f"> {int(teacher.ids.max(initial=-1))}",
        )
    logp = teacher.logp.astype(np.float64)
    head = -(np.exp(logp) * np.where(np.isneginf(logp), 0.0, logp)).sum(axis=1)
    others = vocab_size - count
    # If every id is listed, the rest is only rounding.
    rest = np.where(others > 0, np.maximum(teacher.tail_mass(), 0.0), 0.0)
    lump = -rest * np.log(np.where(rest > 0.0, rest, 1.0))
    low = np.maximum(head + lump, 0.0)
    high = low + rest * np.log(np.maximum(others, 1))
    return np.where(teacher.signal, low, np.nan), np.where(teacher.signal, high, np.nan)
