"""The fast kernel of ``topk_gjs(missing="union_tail")``: float32 in the blocks, float64 in the sums over a row.

With E = beta t at the teacher's slots and (1-beta) s at the student's, each plus what the *other* side's missing share
would add there, one sort of ``id << bits | slot`` a row puts the two slots of a common id side by side. So

    sum_U m log m = sum over slots of M log M,   M = E + (following E - both shares) at the first slot of a pair,

and the second slot of a pair becomes 1, whose logarithm is nothing. 32-bit keys with a gather by slot beat 64-bit keys
that carry the value: the sort is the largest single cost. Masks are multiplied (``where=`` is ten times slower), long
rows are dotted in one pass, buffers are preallocated, aligned and used twice, and a block stays in the second-level
cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from topkd.topk.types import Bool, Float32, Float64, Int32, TopK

BLOCK_SLOTS = 49_152  # per block: all buffers together (29 bytes a slot) stay in the second-level cache
MIN_TAIL = 1e-7  # the least mass a list leaves over: below it, 1 - mass is rounding
_NEVER_ZERO = 1e-28  # keeps the log of a mixture of two vanishing probabilities finite; changes no sum
_NO_LOG = np.float32(-1e4)  # stands for log 0 where it is multiplied by an exact 0
_CACHE_LINE = 64
_DOT_WIDTH = 48  # from here on one dot product a row beats a product and a matrix-vector product


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of the pair; a block with an uncommon row puts ``listed`` and ``share`` right."""

    ids: Int32
    logp: Float32
    weight: float  # of this side in the mixture
    scale: float  # the larger of both sides' weights, which the blocks divide by
    floor: float
    listed: Float64  # [R] entries that are not pads
    share: Float64  # [R] probability of a missing id, before the cap by the left-over mass
    remaining: Float64  # [R] stored tail mass, NaN = unknown

    @classmethod
    def of(cls, scores: TopK, weight: float, floor: float) -> _Side:
        listed, share = np.full(scores.rows, float(scores.k)), np.full(scores.rows, np.exp(floor))
        remaining = np.exp(scores.tail_logp, dtype=np.float64)
        return cls(scores.ids, scores.logp, weight, max(weight, 1.0 - weight), floor, listed, share, remaining)

    def look(self, part: slice) -> bool:
        """Sets ``listed`` and ``share`` of rows that reach below the floor; True where a row has a pad or a zero."""
        ids, logp = self.ids[part], self.logp[part]
        lowest = logp[:, -1].astype(np.float64)
        ragged = np.flatnonzero(np.isneginf(lowest))
        if ragged.size:
            logp = logp[ragged]
            finite = np.isfinite(logp).sum(axis=1)
            lowest[ragged] = np.take_along_axis(logp, np.maximum(finite - 1, 0)[:, None], axis=1)[:, 0]
            self.listed[part][ragged] = (ids[ragged] >= 0).sum(axis=1)
        self.share[part] = np.exp(np.minimum(lowest, self.floor))
        return bool(ragged.size)

    def scaled(self, share: Float64 | np.float64) -> Float32:
        """What a missing id of this side puts into the mixture, in units of the larger weight."""
        return np.asarray(np.maximum(share * (self.weight / self.scale), _NEVER_ZERO), dtype=np.float32)


class UnionTail:
    """Buffers for lists of K_T and K_S entries; a call compares any number of rows."""

    def __init__(self, teacher_k: int, student_k: int) -> None:
        self.width = teacher_k + student_k
        self.columns = slice(0, teacher_k), slice(teacher_k, None)
        self.bits = max(self.width - 1, 1).bit_length()
        self.block_rows = max(1, BLOCK_SLOTS // max(self.width, 1))
        shape = (self.block_rows, self.width)
        self.value: Float32 = _aligned(shape, np.float32)
        self.key, self.step, self.slot, self.base = (_aligned(shape, np.uint32) for _ in range(4))
        self.index, self.equal = _aligned(shape, np.intp), _aligned(shape, np.bool_)
        self.p = tuple(_aligned((self.block_rows, k), np.float32) for k in (teacher_k, student_k))
        self.product = tuple(_aligned((self.block_rows, k), np.float32) for k in (teacher_k, student_k))
        slot = np.arange(self.width, dtype=np.uint32)
        self.slot[:] = slot
        self.base[:] = np.arange(self.block_rows, dtype=np.uint32)[:, None] * np.uint32(self.width)
        # Pads take the top ids, one a slot, so that no two of them look like a pair.
        self.pad = (np.uint32(2 ** (32 - self.bits) - 1) - slot).astype(np.uint32)
        self.ones = np.ones(self.width, dtype=np.float32)
        self.max_id = 2 ** (32 - self.bits) - 1 - self.width

    def __call__(self, teacher: TopK, student: TopK, beta: float, floor: float) -> tuple[Float64, NDArray[np.intp]]:
        """GJS a row, float64 [R], NaN = no signal; and the rows whose value is not final (float64 must redo them).

        Left over are rows whose mass is above 1 or whose missing ids do not fit into the left-over mass, and the blocks
        that hold an id too large for a 32-bit key.
        """
        rows = teacher.rows
        if not rows or not teacher.k or not student.k:
            return np.full(rows, np.nan), np.empty(0, dtype=np.intp)
        sides = _Side.of(teacher, beta, floor), _Side.of(student, 1.0 - beta, floor)
        usual = [side.scaled(np.exp(floor)) for side in sides]
        sums, fits = np.zeros((6, rows)), np.ones(rows, dtype=np.bool_)
        for start in range(0, rows, self.block_rows):
            part = slice(start, min(start + self.block_rows, rows))
            fits[part] = self._block(sides, list(usual), part, sums[:, part])
        return _finish(sides[0], sides[1], sums, fits)

    def _block(self, sides: tuple[_Side, _Side], shares: list[Float32], part: slice, sums: Float64) -> bool:
        """Fills ``sums`` of the block's rows; False where an id does not fit into a key."""
        count, lowest = sums.shape[1], np.exp(sides[0].floor)
        value, key = self.value[:count], self.key[:count]
        ragged = [False, False]
        for index, side in enumerate(sides):
            p, logp, ones = self.p[index][:count], side.logp[part], self.ones[: side.logp.shape[1]]
            np.exp(logp, out=p)
            if p.min() < lowest:
                ragged[index] = side.look(part)
                shares[index] = side.scaled(side.share[part, None])
            sums[2 * index] = _row_sums(p, ones)
            logs = np.maximum(logp, _NO_LOG) if ragged[index] else logp
            sums[2 * index + 1] = _row_dots(p, logs, self.product[index][:count], ones)
            if side.weight != side.scale:
                p *= np.float32(side.weight / side.scale)
        for index, (side, columns) in enumerate(zip(sides, self.columns, strict=True)):
            np.add(self.p[index][:count], shares[1 - index], out=value[:, columns])
            ids = side.ids[part]
            keys = ids.view(np.uint32)
            if ragged[index]:
                pads = ids < 0
                keys = np.where(pads, self.pad[columns], keys)
                np.copyto(value[:, columns], np.float32(1.0), where=pads)  # 1 log 1 = 0: a pad adds nothing at all
            np.left_shift(keys, np.uint32(self.bits), out=key[:, columns])
            if ids.max() > self.max_id:
                return False
        key |= self.slot[:count]
        key.sort(axis=1)
        sums[4], sums[5] = self._mixture(count, shares[0] + shares[1])
        return True

    def _mixture(self, count: int, shares: Float32) -> tuple[Float32, Float32]:
        """Pairs a row, and the sum of M log M a row."""
        key, step, equal, index = self.key[:count], self.step[:count], self.equal[:count], self.index[:count]
        flat = key.reshape(-1)
        np.bitwise_xor(flat[1:], flat[:-1], out=step.reshape(-1)[1:])
        np.less(step, np.uint32(1 << self.bits), out=equal)
        equal[:, 0] = False  # equal[i]: slot i is the second of a pair; no pair spans two rows
        same = step.view(np.float32)
        np.copyto(same, equal)
        np.bitwise_and(key, np.uint32((1 << self.bits) - 1), out=key)
        key += self.base[:count]
        np.copyto(index, key)  # by hand: take would allocate its own copy of the indices for every block
        mixed, second = key.view(np.float32), self.value[:count]
        np.take(self.value.reshape(-1), index, out=mixed, mode="wrap")
        # A hair less than both shares is taken off, so that rounding never makes a mixture negative.
        np.subtract(mixed, shares * np.float32(1 - 1e-6), out=second)
        second *= same
        np.maximum(mixed, same, out=mixed)  # no E is above 1 by more than a share: FAST_FLOOR keeps that small
        mixed.reshape(-1)[:-1] += second.reshape(-1)[1:]
        log = np.log(mixed, out=second)
        return same @ self.ones, _row_dots(mixed, log, log, self.ones)


def _aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An empty array that starts at a cache line: full-width loads and stores then touch one line, not two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _CACHE_LINE, dtype=np.uint8)
    first = -raw.ctypes.data % _CACHE_LINE
    return raw[first : first + size].view(dtype).reshape(shape)


def _row_sums(values: Float32, ones: Float32) -> Float32:
    """Sums over short rows by BLAS; over long ones pairwise, which rounds less."""
    return np.asarray(values @ ones if ones.size <= 128 else values.sum(axis=1))


def _row_dots(left: Float32, right: Float32, product: Float32, ones: Float32) -> Float32:
    """Dot products of the rows; ``product`` is overwritten (it may be one of the two)."""
    if ones.size >= _DOT_WIDTH:
        return np.asarray(np.matmul(left[:, None, :], right[:, :, None])[:, 0, 0])
    return _row_sums(np.multiply(left, right, out=product), ones)


def _finish(teacher: _Side, student: _Side, sums: Float64, fits: Bool) -> tuple[Float64, NDArray[np.intp]]:
    teacher_mass, teacher_log, student_mass, student_log, pairs, mixture = sums
    total, mixture_mass, mixture_tail = -teacher.scale * mixture, np.zeros_like(mixture), np.zeros_like(mixture)
    left = ~fits
    for side, other, mass, p_log_p in (
        (teacher, student, teacher_mass, teacher_log),
        (student, teacher, student_mass, student_log),
    ):
        share = side.share[:1] if (side.share == side.share[0]).all() else side.share  # one logarithm, not R
        missing = other.listed - pairs
        remaining = np.maximum(np.where(np.isnan(side.remaining), 1.0 - mass, side.remaining), MIN_TAIL)
        tail = remaining - share * missing
        left |= (mass > 1.0) | (tail < 0.0)
        tail = np.maximum(tail, 0.0)
        total += side.weight * (p_log_p + missing * _x_log_x(share) + _x_log_x(tail))
        mixture_mass += side.weight * (mass + missing * share)
        mixture_tail += side.weight * tail
    total -= np.log(teacher.scale) * mixture_mass + _x_log_x(mixture_tail)
    signal = (teacher_mass > 0.0) & (student_mass > 0.0)
    return np.where(signal & ~left, np.maximum(total, 0.0), np.nan), np.flatnonzero(left & (signal | ~fits))


def _x_log_x(x: Float64) -> Float64:
    return np.asarray(x * np.log(np.maximum(x, np.finfo(np.float64).tiny)))
