"""GJS of two top-K lists from two servers, which may have different ids, different K, and holes.

beta is the mixture weight of the *teacher*; natural log; NaN = no signal. These values are metrics, never advantages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.inputs import check_floor, check_scores
from topkd.topk.maths.divergence import integrand, shared_support_gjs
from topkd.topk.maths.mass import log_mass
from topkd.topk.maths.scalars import check_beta
from topkd.topk.maths.union import MIN_TAIL, UnionTail
from topkd.topk.types import Bool, Float64, Int32, TopK

_PAD_KEY = np.iinfo(np.int64).max

# Where float32 is exact enough, and the share of a missing id is smaller still; elsewhere float64 is used.
FAST_BETA = (0.01, 0.99)
FAST_FLOOR = (-80.0, -15.0)  # below it exp(floor) is no normal float32, and looks like the 0 of a pad
Missing = Literal["union_tail", "intersection_tail", "floor", "renormalise"]


@dataclass(frozen=True, slots=True)
class Aligned:
    """Two lists on common slots [R, N], N = K_T + K_S; an unused slot is in neither list and has -inf on both sides.

    Attributes:
        teacher: float64 logprobs; -inf where the teacher does not list the id.
        student: float64 logprobs; -inf where the student does not list the id.
        in_teacher: True where the teacher lists the id (with any probability, zero included).
        in_student: True where the student lists the id.
        teacher_tail: float64 [R], probability outside the teacher's list; NaN = unknown, which means 1 - mass.
        student_tail: float64 [R], as above.
    """

    teacher: Float64
    student: Float64
    in_teacher: Bool
    in_student: Bool
    teacher_tail: Float64
    student_tail: Float64

    @property
    def union(self) -> Bool:
        """Whether at least one side lists the id."""
        return np.asarray(self.in_teacher | self.in_student)

    @property
    def both(self) -> Bool:
        """Whether both sides list the id."""
        return np.asarray(self.in_teacher & self.in_student)

    @property
    def signal(self) -> Bool:
        """Whether both sides list at least one id with non-zero probability, bool [R]."""
        return np.asarray(np.isfinite(self.teacher).any(axis=1) & np.isfinite(self.student).any(axis=1))


def align(
    teacher_ids: Int32,
    teacher_logp: NDArray[np.floating],
    student_ids: Int32,
    student_logp: NDArray[np.floating],
    *,
    teacher_tail: Float64 | None = None,
    student_tail: Float64 | None = None,
) -> Aligned:
    """Align two lists per row on the union of their ids; ids are unique within a list, negative ids are pads.

    One sort per row of the keys ``2 id + side`` makes an id that both sides list two neighbours, whose keys differ only
    in the last bit.
    """
    rows, width = teacher_ids.shape[0], teacher_ids.shape[1] + student_ids.shape[1]
    ids = np.concatenate([teacher_ids, student_ids], axis=1).astype(np.int64)
    logp = np.concatenate([teacher_logp, student_logp], axis=1, dtype=np.float64)
    keys = ids * 2
    keys[:, teacher_ids.shape[1] :] += 1
    keys[ids < 0] = _PAD_KEY
    order = np.argsort(keys, axis=1)
    keys, logp = np.take_along_axis(keys, order, axis=1), np.take_along_axis(logp, order, axis=1)

    listed = keys != _PAD_KEY
    from_student = listed & (keys % 2 == 1)
    paired = np.zeros((rows, width), dtype=np.bool_)  # slot i (teacher) and slot i + 1 (student) are one id
    paired[:, :-1] = ((keys[:, 1:] ^ keys[:, :-1]) == 1) & listed[:, 1:]
    second = np.zeros_like(paired)
    second[:, 1:] = paired[:, :-1]
    following = np.full_like(logp, -np.inf)
    following[:, :-1] = logp[:, 1:]

    in_teacher = listed & ~from_student
    in_student = (from_student & ~second) | paired
    unknown = np.full(rows, np.nan)
    return Aligned(
        teacher=np.where(in_teacher, logp, -np.inf),
        student=np.where(paired, following, np.where(in_student, logp, -np.inf)),
        in_teacher=in_teacher,
        in_student=in_student,
        teacher_tail=unknown if teacher_tail is None else teacher_tail,
        student_tail=unknown if student_tail is None else student_tail,
    )


def topk_gjs(
    teacher: TopK, student: TopK, beta: float, missing: Missing = "union_tail", floor: float = -20.0
) -> Float64:
    """Compute GJS_beta between two top-K lists per row, in nats, >= 0; NaN where a side lists nothing.

    The divergence of ``gjs`` (GKD, arXiv:2306.13649), computed from two lists; every variant is approximate.

    ``missing`` says what happens to an id that only one side lists; U is the union of both lists:

    * ``"union_tail"``: GJS over U and one tail bin. A missing id gets q = min(exp(floor), smallest listed p of that
      side, r / number missing), taken from r, that side's mass outside its list, max(1e-7, 1 - mass); what is left of r
      is its tail bin. Both sides stay distributions. The recommended metric: it ranks positions like dense GJS (r = .96
      .. 1.0); usually too low, but not a bound.
    * ``"intersection_tail"``: the common ids and one tail bin, as ``shared_support_gjs(tail="bucket")``. No floor: a
      true lower bound of the dense value; 0 for disjoint lists.
    * ``"floor"``: missing ids get min(floor, that side's smallest listed logprob), then both sides are renormalised
      over U. Neither a bound nor monotone.
    * ``"renormalise"``: the common ids only, each side renormalised on them; NaN where no id is common.

    The mass outside a list is the stored ``tail_logp`` where known, else 1 - mass. ``union_tail`` with beta in .01 ..
    .99 and a floor in -80 .. -15 runs in float32 with float64 sums; all else in float64. The difference is at most 4e-6
    up to K = 200, and 4e-5 at K in the thousands; half of that where ``tail_logp`` is known.

    Args:
        teacher: R rows.
        student: R rows for the same positions (K may differ).
        beta: Mixture weight of the teacher, in [0, 1]: 0 forward KL(T||S), 1 reverse KL(S||T).
        missing: The variant.
        floor: Largest natural-log probability of a missing id (``union_tail`` and ``floor`` only); one too small for a
            float (under -745) gives it probability 0 in ``union_tail``.

    Returns:
        float64 [R].
    """
    beta = check_beta(beta)
    if missing not in ("union_tail", "intersection_tail", "floor", "renormalise"):
        raise ConfigError(
            "topk_gjs: unknown variant",
            got=repr(missing),
            expected="union_tail, intersection_tail, floor or renormalise",
        )
    floor = check_floor("topk_gjs: floor", floor)
    _same_rows(teacher, student)
    if missing == "union_tail" and FAST_BETA[0] <= beta <= FAST_BETA[1] and FAST_FLOOR[0] <= floor <= FAST_FLOOR[1]:
        values, left = UnionTail(teacher, student, beta, floor)()
        if left.size:
            values[left] = _exact(teacher.take(left), student.take(left), beta, missing, floor)
        return values
    return _exact(teacher, student, beta, missing, floor)


def aligned_gjs(pair: Aligned, beta: float, missing: Missing, floor: float) -> Float64:
    """Compute ``topk_gjs`` on an aligned pair, in float64; NaN = no signal."""
    if missing == "union_tail":
        teacher, student = union_bins(pair, floor)
        total = np.maximum(integrand(teacher, student, beta).sum(axis=1), 0.0)
    elif missing == "floor":
        teacher = log_renormalised(_apply_floor(pair.teacher, pair.in_teacher, pair.union, floor))
        student = log_renormalised(_apply_floor(pair.student, pair.in_student, pair.union, floor))
        total = np.maximum(integrand(teacher, student, beta).sum(axis=1), 0.0)
    else:
        common = pair.both
        teacher, student = np.where(common, pair.teacher, -np.inf), np.where(common, pair.student, -np.inf)
        if missing == "renormalise":
            return shared_support_gjs(teacher, student, beta, "renormalise")
        teacher_rest = np.log(_remaining(pair.teacher_tail, pair.teacher, pair.in_teacher & ~common))
        student_rest = np.log(_remaining(pair.student_tail, pair.student, pair.in_student & ~common))
        total = integrand(teacher, student, beta).sum(axis=1) + integrand(teacher_rest, student_rest, beta)
        total = np.maximum(total, 0.0)
    return np.where(pair.signal, total, np.nan)


def union_bins(pair: Aligned, floor: float) -> tuple[Float64, Float64]:
    """Compute both sides' logprobs [R, N + 1] over the union of ids, with the tail bin last (see ``topk_gjs``)."""
    return (
        _with_tail(pair.teacher, pair.in_teacher, pair.union, pair.teacher_tail, floor),
        _with_tail(pair.student, pair.in_student, pair.union, pair.student_tail, floor),
    )


def _with_tail(logp: Float64, listed: Bool, union: Bool, tail: Float64, floor: float) -> Float64:
    mass = np.exp(logp).sum(axis=1)
    remaining = np.maximum(np.where(np.isnan(tail), 1.0 - mass, tail), MIN_TAIL)
    logp = logp - np.log(np.maximum(mass, 1.0))[:, None]
    absent = union & ~listed
    count = absent.sum(axis=1)
    smallest = np.where(np.isfinite(logp), logp, np.inf).min(axis=1, initial=np.inf)
    # in logs: a listed probability below the smallest double still counts, and gives no infinity at beta 0 or 1
    floor = floor if np.exp(floor) > 0.0 else -np.inf  # such a floor means no probability
    filler = np.minimum(np.minimum(floor, smallest), np.log(remaining / np.maximum(count, 1)))
    share = np.exp(filler)
    # if missing ids take all of the mass, the difference is rounding; at beta 0 or 1 it would decide about infinity
    spent = share * count >= remaining * (1.0 - 1e-12)
    with np.errstate(divide="ignore"):
        rest = np.log(np.where(spent, 0.0, remaining - share * count))
    return np.concatenate([np.where(absent, filler[:, None], logp), rest[:, None]], axis=1)


def _apply_floor(logp: Float64, listed: Bool, union: Bool, floor: float) -> Float64:
    smallest = np.where(np.isfinite(logp), logp, np.inf).min(axis=1, initial=np.inf)
    return np.asarray(np.where(union & ~listed, np.minimum(floor, smallest)[:, None], logp))


def log_renormalised(logp: Float64) -> Float64:
    """Renormalise logprobs over the last axis to mass 1; a row of -inf becomes NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(logp - log_mass(logp)[..., None])


def _remaining(tail: Float64, logp: Float64, dropped: Bool) -> Float64:
    kept = 1.0 - np.exp(logp, where=~dropped, out=np.zeros_like(logp)).sum(axis=1)
    known = tail + np.exp(logp, where=dropped, out=np.zeros_like(logp)).sum(axis=1)
    return np.asarray(np.maximum(np.where(np.isnan(tail), kept, known), MIN_TAIL))


def _exact(teacher: TopK, student: TopK, beta: float, missing: Missing, floor: float) -> Float64:
    return aligned_gjs(align_scores(teacher, student), beta, missing, floor)


def align_scores(teacher: TopK, student: TopK) -> Aligned:
    """Align both scores' lists on the union of their ids, with their stored tail masses."""
    _same_rows(teacher, student)
    return align(
        teacher.ids,
        teacher.logp,
        student.ids,
        student.logp,
        teacher_tail=np.exp(teacher.tail_logp, dtype=np.float64),
        student_tail=np.exp(student.tail_logp, dtype=np.float64),
    )


def _same_rows(teacher: TopK, student: TopK) -> None:
    check_scores(teacher=teacher, student=student)
    if teacher.rows != student.rows:
        raise ConfigError(
            "teacher and student have different numbers of rows", got=f"{teacher.rows} and {student.rows}"
        )
    differ = (teacher.actual_ids != student.actual_ids) & (teacher.actual_ids >= 0) & (student.actual_ids >= 0)
    if differ.any():
        row = int(np.argmax(differ))
        raise AlignmentError(
            "teacher and student rows are for different completions",
            where=f"row {row}",
            got=f"token {teacher.actual_ids[row]} and {student.actual_ids[row]}",
            hint="slice each side with its own prompt length",
        )
