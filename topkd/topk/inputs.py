"""Check the arguments of the NumPy maths; convert logprobs to float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.topk.errors import ConfigError
from topkd.topk.maths.scalars import check_real
from topkd.topk.types import Float64, TopK

LOGP_TOLERANCE = 1e-3  # float32 rounding of a logprob stays far below; above it, the numbers are logits


def float64(name: str, value: ArrayLike) -> Float64:
    """Return ``value`` as float64, masked entries as NaN; refuse non-numbers and ragged lists."""
    try:
        array = np.asarray(value) if not isinstance(value, np.ma.MaskedArray) else value
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot read
        raise ConfigError(
            f"{name}: not an array of numbers",
            got=f"{type(value).__name__} ({error})",
            hint="pass one rectangular array; a tensor as tensor.detach().float().cpu().numpy()",
        ) from error
    if array.dtype.kind not in "iuf" and array.size:
        raise ConfigError(f"{name}: not an array of numbers", got=array.dtype, expected="floating point")
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(np.float64), np.nan)
    return np.asarray(array).astype(np.float64, copy=False)


def logp64(name: str, value: ArrayLike) -> Float64:
    """Return ``value`` as float64; refuse values above 0. NaN (unknown) and -inf (probability 0) pass."""
    array = float64(name, value)
    if array.size and np.fmax.reduce(array, axis=None) > LOGP_TOLERANCE:
        raise ConfigError(
            f"{name}: logprob above 0",
            got=f"{np.fmax.reduce(array, axis=None):.6g}",
            hint="pass natural-log probabilities, not logits",
        )
    return array


def logp_pair(teacher_logp: ArrayLike, student_logp: ArrayLike) -> tuple[Float64, Float64]:
    """Return both sides as float64 of one shape (only a scalar is broadcast)."""
    teacher, student = logp64("teacher_logp", teacher_logp), logp64("student_logp", student_logp)
    if teacher.shape != student.shape and teacher.ndim and student.ndim:
        raise ConfigError(
            "teacher_logp and student_logp differ in shape",
            got=f"{teacher.shape} and {student.shape}",
            hint="row i of both must be the same position",
        )
    return teacher, student


def result_dtype(*values: ArrayLike) -> np.dtype[np.floating]:
    """Return float32 when every argument is an array of at most 32-bit floats, else float64."""
    narrow = all(isinstance(v, (np.ndarray, np.generic)) and v.dtype in (np.float32, np.float16) for v in values)
    return np.dtype(np.float32 if narrow else np.float64)


def to_dtype(value: Float64, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    """Convert to ``dtype``; a value too large for float32 becomes infinite without a warning."""
    with np.errstate(over="ignore"):
        return value.astype(dtype, copy=False)


def check_floor(name: str, value: float) -> float:
    """Return ``value``, a negative log-probability that replaces a missing one (-inf = probability zero)."""
    number = check_real(name, value)
    if not number < 0.0:
        raise ConfigError(f"{name} must be a negative log-probability", got=number)
    return number


def check_scores(**scores: TopK) -> None:
    """Refuse anything but ``TopK`` values, by the name of the argument."""
    for name, value in scores.items():
        if not isinstance(value, TopK):
            raise ConfigError(
                f"{name}: not a TopK",
                got=type(value).__name__,
                hint="build one with TopK.from_lists([[(id, logprob), ...], ...])",
            )
