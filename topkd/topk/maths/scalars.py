"""Checks of scalar arguments; each error names the argument."""

from __future__ import annotations

import operator

import numpy as np

from topkd.topk.errors import ConfigError


def check_real(name: str, value: object) -> float:
    """Return ``value`` as a float; refuse text and booleans."""
    if isinstance(value, (str, bytes, bool, np.bool_)):  # float() accepts "nan" and True
        raise ConfigError(f"{name} must be a number", got=repr(value))
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be a number", got=repr(value)) from error


def check_fraction(name: str, value: object, hint: str = "") -> float:
    """Return ``value`` as a float in [0, 1]."""
    number = check_real(name, value)
    if not 0.0 <= number <= 1.0:
        raise ConfigError(f"{name} must lie in [0, 1]", got=value, hint=hint)
    return number


def check_beta(beta: object, name: str = "beta") -> float:
    """Return ``beta`` as a float in [0, 1]: the mixture weight of the *teacher*."""
    return check_fraction(name, beta, "the teacher's weight: 0 = forward KL, 1 = reverse KL, between = GJS")


def check_lam(lam: object) -> float:
    """Return ``lam`` as a float in [0, 1]: the weight of the sampled tail."""
    return check_fraction("lam", lam, "0 = divergence of the K + 1 bins, 1 = of the whole vocabulary")


def check_above_zero(**values: float | None) -> None:
    """Refuse a value that is not above 0; None passes."""
    for name, value in values.items():
        if value is not None and not check_real(name, value) > 0:
            raise ConfigError(f"{name} must be positive", got=value)


def check_integer(name: str, value: object) -> int:
    """Return ``value`` as an integer; refuse floats and booleans."""
    if isinstance(value, bool):  # a boolean is not a count
        raise ConfigError(f"{name} must be an integer", got=value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"{name} must be an integer", got=repr(value)) from error


def check_positive(name: str, value: object) -> int:
    """Return ``value`` as an integer of at least 1."""
    number = check_integer(name, value)
    if number < 1:
        raise ConfigError(f"{name} must be at least 1", got=number)
    return number
