"""List functions of the earlier engine that topkd was developed from, with their original names, for comparison.

They take plain lists of (id, logprob), and return the original values where those are divergences. topkd itself uses
``topk_gjs`` (union of both lists, with a tail), exact sampled-token logprobs, and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.inputs import check_floor, logp64
from topkd.topk.maths.divergence import integrand
from topkd.topk.maths.pairs import align, log_renormalised
from topkd.topk.maths.ragged import pad_rows
from topkd.topk.maths.scalars import check_beta, check_integer
from topkd.topk.types import PAD_ID, Float64, Int32

Position: TypeAlias = Sequence[tuple[int, float]]
_Entry = TypeVar("_Entry")


def compute_topk_gjs(
    teacher_topk: Sequence[Position], student_topk: Sequence[Position], alpha: float, floor_logprob: float = -20.0
) -> list[float]:
    """Compute GJS_alpha on the teacher's ids only, with missing student entries floored and both sides renormalised.

    With t~ and s~ the two sides divided by their mass on the teacher's ids, and alpha the teacher's weight::

        alpha KL(t~||m) + (1-alpha) KL(s~||m),   m = alpha t~ + (1-alpha) s~          0 < alpha < 1

    Natural log, >= 0 (GKD's divergence, arXiv:2306.13649). Approximate: ignores the mass outside the teacher's list, is
    0 for K = 1, and small for *disjoint* lists (every student entry is the floor, and renormalises to uniform). Prefer
    ``topk_gjs``. For 0 < alpha < 1 these are the original values. Where the original value is not a divergence, this
    one is: alpha = 0 is KL(T||S) and alpha = 1 is KL(S||T) on the same ids; a repeated id counts once, with its larger
    logprob; NaN entries are dropped.

    Returns:
        One float per position; NaN where either list is empty (no signal).
    """
    alpha = check_beta(alpha, "alpha")
    floor_logprob = check_floor("floor_logprob", floor_logprob)
    _check_lists(teacher_topk=teacher_topk, student_topk=student_topk)
    if len(teacher_topk) != len(student_topk):
        raise AlignmentError(
            "teacher_topk and student_topk differ in length", got=f"{len(teacher_topk)} and {len(student_topk)}"
        )
    if len(teacher_topk) == 0:  # len(), because the truth value of a NumPy array is an error
        return []
    teacher_ids, teacher_logp = _pad("teacher_topk", teacher_topk)
    student_ids, student_logp = _pad("student_topk", student_topk)
    pair = align(teacher_ids, teacher_logp, student_ids, student_logp)
    student = np.where(pair.in_teacher & ~pair.in_student, floor_logprob, pair.student)
    student = log_renormalised(np.where(pair.in_teacher, student, -np.inf))
    total = integrand(log_renormalised(pair.teacher), student, alpha).sum(axis=1)
    values: list[float] = np.where(pair.signal, np.maximum(total, 0.0), np.nan).tolist()
    return values


def extract_token_logprobs(
    topk: Sequence[Position], token_ids: Sequence[int], floor_logprob: float | None = -20.0
) -> list[float]:
    """Look up one token's listed logprob at each position; ``floor_logprob`` where the list lacks it.

    Only for reading old data; natural log, in CLaaS's form. A floored logprob is not a logprob: an importance ratio
    computed from it can be wrong by a factor of e^17, an advantage by 17 nats. Pass ``floor_logprob=None`` for NaN (and
    mask it), or use ``TopK.actual_logp``.
    """
    _check_lists(topk=topk, token_ids=token_ids)
    if len(topk) != len(token_ids):
        raise AlignmentError("topk and token_ids differ in length", got=f"{len(topk)} and {len(token_ids)}")
    if len(topk) == 0:
        return []
    ids, logp = _pad("topk", topk)
    tokens = np.array([check_integer("token_ids: a token id", token) for token in token_ids], dtype=np.int64)
    hit = (ids == tokens[:, None]) & (ids >= 0)
    found = np.where(hit, logp, -np.inf).max(axis=1, initial=-np.inf)
    absent = np.nan if floor_logprob is None else check_floor("floor_logprob", floor_logprob)
    values: list[float] = np.where(hit.any(axis=1), found, absent).tolist()
    return values


def slice_completion_topk(
    full: Sequence[Sequence[_Entry] | None], prompt_len: int, completion_len: int
) -> list[list[_Entry]]:
    """Return the completion's positions of a prompt-logprobs reply; null becomes an empty list.

    ``full[i]`` scores token i given the tokens before it, so the completion starts at ``prompt_len``. An empty list is
    a hole (no signal), not a distribution. A reply that is too short gives fewer positions: check the length.
    """
    prompt_len, completion_len = (
        check_integer("prompt_len", prompt_len),
        check_integer("completion_len", completion_len),
    )
    _check_lists(full=full)
    if prompt_len < 0 or completion_len < 0:
        raise ConfigError("prompt_len and completion_len must not be negative", got=f"{prompt_len}, {completion_len}")
    wanted = full[prompt_len : prompt_len + completion_len]
    for place, position in enumerate(wanted, prompt_len):
        if position is not None:
            _check_lists(**{f"full[{place}]": position})
    return [list(position or ()) for position in wanted]


def _check_lists(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
            raise ConfigError(f"{name}: not a list", got=type(value).__name__)


def _pad(name: str, positions: Sequence[Position | None]) -> tuple[Int32, Float64]:
    """Pad to [R, K] ids and float64 logprobs, -1 and -inf at pads; refuse a logprob above 0."""
    ids, logp = pad_rows(name, positions, PAD_ID)
    return ids, logp64(name, logp)
