"""Checks of scalar arguments; each error names the argument."""

from __future__ import annotations

import operator

import numpy as np

from topkd.topk.errors import ConfigError


def check_real(name: str, value: object) -> float:
    """Return ``value`` as a float; refuse text and flags."""
    if isinstance(value, (str, bytes, bool, np.bool_)):  # float() takes "nan" and True
        raise ConfigError(f"{name} must be a number", got=repr(value))
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be a number", got=repr(value)) from error


def check_integer(name: str, value: object) -> int:
    """Return ``value`` as an integer; refuse floats and flags."""
    if isinstance(value, bool):  # a flag is no count
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
