"""Two lists of (id, logprob) a row, brought to one set of ids: the union, each id once, with who listed it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topkd.topk.types import Bool, Float64, Int32

_PAD_KEY = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Aligned:
    """[R, N] slots, N = K_T + K_S; a slot outside the union is in neither list and holds -inf on both sides.

    Attributes:
        teacher: float64 logprobs; -inf where the teacher does not list the id.
        student: float64 logprobs; -inf where the student does not list the id.
        in_teacher: True where the teacher lists the id (with any probability, zero included).
        in_student: True where the student does.
        teacher_tail: float64 [R], probability outside the teacher's list; NaN = unknown, to be taken as 1 - mass.
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
        """True where at least one side lists the id."""
        return np.asarray(self.in_teacher | self.in_student)

    @property
    def both(self) -> Bool:
        """True where both sides list the id."""
        return np.asarray(self.in_teacher & self.in_student)

    @property
    def signal(self) -> Bool:
        """bool [R]: both sides list at least one id with non-zero probability."""
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
    """The union of two lists a row; ids are unique within a list, negative ids are pads.

    One sort a row of the keys ``2 id + side``: an id that both sides list becomes two neighbours whose keys differ only
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
