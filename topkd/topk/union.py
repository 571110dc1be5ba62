"""The fast kernel of ``topk_gjs(missing="union_tail")``: float32 in the blocks, float64 in the sums over a row.

With E = beta t at the teacher's slots and (1-beta) s at the student's, each plus what the *other* side's missing share
would add there, one sort of ``id << bits | slot`` a row puts the two slots of a common id side by side. So

    sum_U m log m = sum over slots of M log M,   M = E + (following E - both shares) at the first slot of a pair,

and the second slot of a pair is multiplied away. 32-bit keys with a gather by slot beat 64-bit keys that carry the
value: the sort is the largest single cost. Masks are multiplied (``where=`` is ten times slower), buffers are
preallocated, shifts run over the flat block, and a block stays in the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topkd.topk.types import Bool, Float32, Float64, Int32, TopK

BLOCK_SLOTS = 32_768  # per block: all buffers together stay in the second-level cache
MIN_TAIL = 1e-7  # the least mass a list leaves over: below it, 1 - mass is rounding
_NEVER_ZERO = 1e-28  # keeps the log of a mixture of two vanishing probabilities finite; changes no sum
_NO_LOG = np.float32(-1e4)  # stands for log 0 where it is multiplied by an exact 0


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of the pair, with what is known of each row before the lists are compared."""

    ids: Int32
    logp: Float32
    listed: Float64  # [R] entries that are not pads
    share: (
        Float64  # [R], or [1] where all rows agree: probability of a missing id, before the cap by the left-over mass
    )
    remaining: Float64  # [R] stored tail mass, NaN = unknown
    ragged: Bool  # [R] the row has a pad or an exact zero


def _side(scores: TopK, floor: float) -> _Side:
    if not scores.k:
        empty = np.zeros(scores.rows)
        return _Side(scores.ids, scores.logp, empty, empty, empty, np.ones(scores.rows, dtype=np.bool_))
    last = scores.logp[:, -1]
    ragged = np.isneginf(last) | (scores.ids[:, -1] < 0)
    listed = np.full(scores.rows, float(scores.k))
    if ragged.any():
        logp = scores.logp[ragged]
        listed[ragged] = (scores.ids[ragged] >= 0).sum(axis=1)
        finite = np.isfinite(logp).sum(axis=1)
        last = last.copy()
        last[ragged] = np.take_along_axis(logp, np.maximum(finite - 1, 0)[:, None], axis=1)[:, 0]
    lowest = np.minimum(last, floor, dtype=np.float64)
    share = np.exp(lowest[:1] if (lowest == lowest[0]).all() else lowest)
    return _Side(scores.ids, scores.logp, listed, share, np.exp(scores.tail_logp, dtype=np.float64), ragged)


class UnionTail:
    """Buffers for lists of K_T and K_S entries; a call compares any number of rows."""

    def __init__(self, teacher_k: int, student_k: int) -> None:
        self.split, self.width = teacher_k, teacher_k + student_k
        self.bits = max(self.width - 1, 1).bit_length()
        self.block_rows = max(1, BLOCK_SLOTS // max(self.width, 1))
        shape = (self.block_rows, self.width)
        self.value, self.mixed, self.log, self.same = (np.empty(shape, dtype=np.float32) for _ in range(4))
        self.key, self.step = np.empty(shape, dtype=np.uint32), np.empty(shape, dtype=np.uint32)
        self.index = np.empty(shape, dtype=np.intp)
        self.equal = np.zeros(shape, dtype=np.bool_)
        self.p = tuple(np.empty((self.block_rows, k), dtype=np.float32) for k in (teacher_k, student_k))
        self.product = tuple(np.empty_like(p) for p in self.p)
        self.shares: list[Float32] = []
        slot = np.arange(self.width, dtype=np.uint32)
        self.slot = slot + np.zeros_like(self.key)
        self.base = np.arange(self.block_rows, dtype=np.uint32)[:, None] * np.uint32(self.width) + np.zeros_like(
            self.key
        )
        # Pads take the top ids, one a slot, so that no two of them look like a pair.
        self.pad = (np.uint32(2 ** (32 - self.bits) - 1) - slot).astype(np.uint32)
        self.ones = np.ones(self.width, dtype=np.float32)
        self.max_id = 2 ** (32 - self.bits) - 1 - self.width

    def __call__(self, teacher: TopK, student: TopK, beta: float, floor: float) -> tuple[Float64, NDArray[np.intp]]:
        """GJS a row, float64 [R], NaN = no signal; and the rows whose value is not final (float64 must redo them).

        Left over are rows whose mass is above 1 or whose missing ids do not fit into the left-over mass, and every row
        when ids are too large for a 32-bit key.
        """
        rows = teacher.rows
        if not rows or not self.split or self.width == self.split:
            return np.full(rows, np.nan), np.empty(0, dtype=np.intp)
        if max(int(teacher.ids.max()), int(student.ids.max())) > self.max_id:
            return np.full(rows, np.nan), np.arange(rows)
        sides = _side(teacher, floor), _side(student, floor)
        self._set_shares(sides[0].share, sides[1].share, beta)
        sums = np.empty((6, rows))
        for start in range(0, rows, self.block_rows):
            part = slice(start, min(start + self.block_rows, rows))
            self._block(sides[0], sides[1], part, beta, sums[:, part])
        return _finish(sides[0], sides[1], sums, beta)

    def _block(self, teacher: _Side, student: _Side, part: slice, beta: float, sums: Float64) -> None:
        count, split = sums.shape[1], self.split
        value, key = self.value[:count], self.key[:count]
        scale = max(beta, 1.0 - beta)
        shares = [share if share.ndim == 0 else share[part, None] for share in self.shares]
        for index, (side, columns, weight) in enumerate(
            ((teacher, slice(0, split), beta), (student, slice(split, None), 1.0 - beta))
        ):
            p, product = self.p[index][:count], self.product[index][:count]
            logp, ids, ones = side.logp[part], side.ids[part], self.ones[columns]
            ragged = bool(side.ragged[part].any())
            np.exp(logp, out=p)
            np.multiply(p, np.maximum(logp, _NO_LOG) if ragged else logp, out=product)
            sums[2 * index] = _row_sums(p, ones)
            sums[2 * index + 1] = _row_sums(product, ones)
            if weight != scale:
                p *= np.float32(weight / scale)
            np.add(p, shares[index], out=value[:, columns])
            keys = ids.view(np.uint32)
            if ragged:
                pads = ids < 0
                keys = np.where(pads, self.pad[columns], keys)
                np.copyto(value[:, columns], np.float32(1.0), where=pads)  # 1 log 1 = 0: a pad adds nothing at all
            np.left_shift(keys, np.uint32(self.bits), out=key[:, columns])
        key |= self.slot[:count]
        key.sort(axis=1)
        sums[4], sums[5] = self._mixture(count, np.asarray(shares[0] + shares[1]))

    def _set_shares(self, teacher: Float64, student: Float64, beta: float) -> None:
        """What a teacher slot and a student slot get for the side that may lack the id, in units of the larger weight.

        One number where all rows agree: a broadcast column costs as much as a logarithm.
        """
        scale = max(beta, 1.0 - beta)
        self.shares = [
            np.maximum(share * (weight / scale), _NEVER_ZERO).astype(np.float32).reshape(() if share.size == 1 else -1)
            for share, weight in ((student, 1.0 - beta), (teacher, beta))
        ]

    def _mixture(self, count: int, shares: Float32) -> tuple[Float32, Float32]:
        """Pairs a row, and the sum of M log M a row."""
        key, step, equal = self.key[:count], self.step[:count], self.equal[:count]
        mixed, log, same = self.mixed[:count], self.log[:count], self.same[:count]
        flat_key, flat_mixed = key.reshape(-1), mixed.reshape(-1)
        np.bitwise_xor(flat_key[1:], flat_key[:-1], out=step.reshape(-1)[1:])
        np.less(step, np.uint32(1 << self.bits), out=equal)
        equal[:, 0] = False  # equal[i]: slot i is the second of a pair; no pair spans two rows
        np.copyto(same, equal)
        np.bitwise_and(key, np.uint32((1 << self.bits) - 1), out=key)
        key += self.base[:count]
        index = self.index[:count]
        np.copyto(index, key)  # by hand: take would allocate its own copy of the indices for every block
        np.take(self.value.reshape(-1), index, out=mixed, mode="wrap")
        # A hair less than both shares is taken off, so that rounding never makes a mixture negative.
        np.subtract(mixed, shares * np.float32(1 - 1e-6), out=log)
        log *= same
        flat_mixed[:-1] += log.reshape(-1)[1:]
        np.log(mixed, out=log)
        pairs = same @ self.ones
        np.subtract(np.float32(1.0), same, out=same)
        mixed *= same
        log *= mixed
        return pairs, _row_sums(log, self.ones)


def _row_sums(values: Float32, ones: Float32) -> Float32:
    """Sums over short rows by BLAS; over long ones pairwise, which rounds less."""
    return np.asarray(values @ ones if ones.size <= 128 else values.sum(axis=1))


def _finish(teacher: _Side, student: _Side, sums: Float64, beta: float) -> tuple[Float64, NDArray[np.intp]]:
    teacher_mass, teacher_log, student_mass, student_log, pairs, mixture = sums
    scale = max(beta, 1.0 - beta)
    total, mixture_mass, mixture_tail = -scale * mixture, np.zeros_like(mixture), np.zeros_like(mixture)
    left = np.zeros(mixture.shape, dtype=np.bool_)
    for side, other, weight, mass, p_log_p in (
        (teacher, student, beta, teacher_mass, teacher_log),
        (student, teacher, 1.0 - beta, student_mass, student_log),
    ):
        missing = other.listed - pairs
        remaining = np.maximum(np.where(np.isnan(side.remaining), 1.0 - mass, side.remaining), MIN_TAIL)
        tail = remaining - side.share * missing
        left |= (mass > 1.0) | (tail < 0.0)
        tail = np.maximum(tail, 0.0)
        total += weight * (p_log_p + missing * _x_log_x(side.share) + _x_log_x(tail))
        mixture_mass += weight * (mass + missing * side.share)
        mixture_tail += weight * tail
    total -= np.log(scale) * mixture_mass + _x_log_x(mixture_tail)
    signal = (teacher_mass > 0.0) & (student_mass > 0.0)
    return np.where(signal, np.maximum(total, 0.0), np.nan), np.flatnonzero(left & signal)


def _x_log_x(x: Float64) -> Float64:
    return np.asarray(x * np.log(np.maximum(x, np.finfo(np.float64).tiny)))
