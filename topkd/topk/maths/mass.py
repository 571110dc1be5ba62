"""Captured mass and the mass left over: log sum exp over a list, and log(1 - that) without cancellation."""

from __future__ import annotations

import numpy as np

from topkd.topk.errors import ConfigError
from topkd.topk.types import MASS_TOLERANCE, Float64

LOG_MASS_CLAMP = -1e-7  # largest log of a captured mass: keeps log(1 - mass) finite, as the published losses do


def log_mass(logp: Float64) -> Float64:
    """log sum_k exp(logp_k) over the last axis, natural log; -inf for a row of -inf, NaN where an entry is NaN."""
    top = logp.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(logp - shift).sum(axis=-1)) + shift[..., 0])


def log_tail(logp: Float64, *, clamp: float = LOG_MASS_CLAMP) -> Float64:
    """log(1 - sum_k exp(logp_k)) over the last axis as log(-expm1(min(lse, clamp))): never log of a negative number.

    At the default clamp the smallest tail is log(1e-7) = -16.1, whatever rounding did to the list.
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
