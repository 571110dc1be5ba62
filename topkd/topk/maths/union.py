"""The fast kernel of ``topk_gjs(missing="union_tail")``: float32 in the blocks, float64 in the sums over a row.

A slot is one entry of either list. E is beta t at the teacher's slots and (1-beta) s at the student's, each plus the
share that the *other* side would get if it lacked the id. One sort per row of ``id << bits | slot`` puts the two slots
of a common id next to each other. So

    sum_U m log m = sum over slots of M log M,   M = E + (following E - both shares) at the first slot of a pair,

and the second slot of a pair becomes 1, whose logarithm is 0. Keys have 31 bits: the sort takes most of the time, and a
gather by slot is faster than 64-bit keys that include the value; the sign of a difference shows a pair. Masks are
multiplied (``where=`` is ten times slower). Both lists are in one array, so that all work except the copies runs over
complete rows; buffers are aligned, used twice and kept for the next call, because new pages take as long as a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from topkd.topk.types import Bool, Float32, Float64, Int32, TopK

KEY_BITS = 31
BLOCK_SLOTS = 131_072  # calls take some 25 microseconds per block; its buffers take 32 bytes per slot
MIN_TAIL = 1e-7  # smallest mass outside a list: below it, 1 - mass is rounding
_NEVER_ZERO = 1e-28  # keeps the log of a mixture of two vanishing probabilities finite; changes no sum
_TINY = np.finfo(np.float64).tiny
_NO_LOG = np.float32(-1e4)  # stands for log 0 where it is multiplied by an exact 0
_ONE = np.float32(1.0).view(np.uint32)  # its bits
_A_HAIR_LESS = np.float32(1 - 1e-6)  # of both shares is subtracted, so that rounding makes no mixture negative
_CACHE_LINE = 64


@dataclass(slots=True)
class _Side:
    """One side of the pair. ``listed`` and ``share`` are scalars until a row needs its own values."""

    ids: Int32
    logp: Float32
    weight: float  # of this side in the mixture
    scale: float  # the larger of both sides' weights, which the blocks divide by
    floor: float
    listed: Float64  # [] or [R] entries that are not pads
    share: Float64  # [] or [R] probability of a missing id, before it is capped by the mass outside the list
    remaining: Float64  # [R] stored tail mass, NaN = unknown

    @classmethod
    def of(cls, scores: TopK, weight: float, floor: float) -> _Side:
        listed, share = np.asarray(float(scores.k)), np.asarray(np.exp(floor))
        remaining = np.exp(scores.tail_logp).astype(np.float64)  # as exact as the float32 that it comes from
        return cls(scores.ids, scores.logp, weight, max(weight, 1.0 - weight), floor, listed, share, remaining)

    def look(self, part: slice) -> None:
        """Set ``listed`` and ``share`` of the rows in ``part``, which have pads, zeros or entries below the floor."""
        if not self.share.ndim:
            self.listed, self.share = (np.full(len(self.logp), number) for number in (self.listed, self.share))
        ids, logp = self.ids[part], self.logp[part]
        lowest = logp[:, -1].astype(np.float64)
        ragged = np.flatnonzero(np.isneginf(lowest))
        if ragged.size:
            logp = logp[ragged]
            finite = np.isfinite(logp).sum(axis=1)
            lowest[ragged] = np.take_along_axis(logp, np.maximum(finite - 1, 0)[:, None], axis=1)[:, 0]
            self.listed[part][ragged] = (ids[ragged] >= 0).sum(axis=1)
        self.share[part] = np.exp(np.minimum(lowest, self.floor))

    def scaled(self, part: slice) -> Float32:
        """Compute what a missing id of this side adds to the mixture, in units of the larger weight: [] or [n, 1]."""
        share = self.share[part, None] if self.share.ndim else self.share
        return np.asarray(np.maximum(share * (self.weight / self.scale), _NEVER_ZERO), dtype=np.float32)


class UnionTail:
    """Lists of K_T and K_S entries for the same rows, which are compared a block of rows at a time."""

    def __init__(self, teacher: TopK, student: TopK, beta: float, floor: float) -> None:
        self.sides = _Side.of(teacher, beta, floor), _Side.of(student, 1.0 - beta, floor)
        self.rows, self.width = teacher.rows, teacher.k + student.k
        self.empty = not (teacher.rows and teacher.k and student.k)
        self.columns = slice(0, teacher.k), slice(teacher.k, self.width)
        bits = max(self.width - 1, 1).bit_length()
        self.block_rows = max(1, min(BLOCK_SLOTS // max(self.width, 1), self.rows))
        self.max_id = 2 ** (KEY_BITS - bits) - 1 - self.width
        self.floor, self.bits, self.pair = floor, np.uint32(bits), np.uint32(1 << bits)
        self.slot_bits = self.pair - np.uint32(1)
        # Pads get the largest ids, a different one per slot, so that no two of them form a pair.
        pad = 2 ** (KEY_BITS - bits) - 1 - np.arange(self.width)
        self.pad = pad.astype(np.uint32) << self.bits
        self.ones = np.ones(self.width, dtype=np.float32)
        self.side_of = np.zeros((self.width, 2), dtype=np.float32)
        for side, columns in enumerate(self.columns):
            self.side_of[columns, side] = 1.0
        shares = [side.scaled(slice(0)) for side in self.sides]
        self.taken = (shares[0] + shares[1]) * _A_HAIR_LESS
        self.scale = self._wide([np.float32(side.weight / side.scale) for side in self.sides])
        self.added = self._wide(shares[::-1])  # each side's slots get the other side's share

    def __call__(self) -> tuple[Float64, NDArray[np.intp]]:
        """Compute GJS of each row, float64 [R], NaN = no signal, and the rows that must be computed again in float64.

        These are rows whose mass is above 1 or whose missing ids need more than the mass outside the list, and all rows
        of blocks with an id too large for a short key.
        """
        if self.empty:
            return np.full(self.rows, np.nan), np.empty(0, dtype=np.intp)
        sums, fits = np.zeros((5, self.rows)), np.ones(self.rows, dtype=np.bool_)
        whole = _Block.ready(self.block_rows, self.columns)
        for start in range(0, self.rows, self.block_rows):
            part = slice(start, min(start + self.block_rows, self.rows))
            fits[part] = self._block(whole.head(part.stop - start), part, sums[:, part])
        _IDLE.append(whole)
        return _finish(*self.sides, sums, fits)

    def _wide(self, each: list[Any]) -> Float32:
        """Spread one number per side over a block: a scalar if equal, else [n, W] (two strided halves are slower)."""
        if each[0] == each[1]:
            return np.asarray(each[0])
        wide: Float32 = _allocate_aligned((self.block_rows, self.width), np.float32)
        for number, columns in zip(each, self.columns, strict=True):
            wide[:, columns] = number
        return wide

    def _block(self, block: _Block, part: slice, sums: Float64) -> bool:
        """Fill ``sums`` of the block's rows; return False if an id does not fit into a key."""
        value, logp, key = block.value, block.mixed, block.key
        np.concatenate([side.ids[part] for side in self.sides], axis=1, out=block.ids)
        if np.maximum.reduce(block.ids, axis=None) > self.max_id:
            return False
        np.left_shift(key, self.bits, out=key)
        np.concatenate([side.logp[part] for side in self.sides], axis=1, out=logp)
        np.exp(logp, out=value)
        sums[:2] = (value @ self.side_of).T
        usual = np.minimum.reduce(block.ends, axis=None) >= self.floor  # the lists descend, and a pad is -inf
        pads = None if usual else [self._pads(block, side, part) for side in (0, 1)]
        if self.scale.ndim or self.scale != 1.0:
            value *= self.scale[: len(value)] if self.scale.ndim else self.scale
        sums[2] = _dots(value, logp)
        taken = self.taken
        if pads is None:
            value += self.added[: len(value)] if self.added.ndim else self.added
        else:
            shares = [side.scaled(part) for side in self.sides]
            taken = (shares[0] + shares[1]) * _A_HAIR_LESS
            for pad, columns, added in zip(pads, self.columns, shares[::-1], strict=True):
                value[:, columns] += added
                if pad is not None:  # 1 log 1 = 0: a pad adds nothing
                    np.copyto(value[:, columns], np.float32(1.0), where=pad)
        np.bitwise_or(key, block.slot, out=key)
        key.sort(axis=1)
        sums[3], sums[4] = self._mixture(block, taken)
        return True

    def _pads(self, block: _Block, which: int, part: slice) -> Bool | None:
        """Find a side's pads, and prepare its rows with entries below the floor; None if there are none."""
        side, columns = self.sides[which], self.columns[which]
        if block.ends[:, which].min() >= self.floor:
            return None
        side.look(part)
        pads = np.asarray(side.ids[part] < 0)
        logp = block.mixed[:, columns]
        np.maximum(logp, _NO_LOG, out=logp)
        np.copyto(block.key[:, columns], self.pad[columns], where=pads)
        return pads

    def _mixture(self, block: _Block, taken: Float32) -> tuple[Float32, Float32]:
        """Count the pairs of each row, and sum its M log M."""
        key, mixed, second, step, same = block.key, block.mixed, block.value, block.step, block.same
        np.bitwise_xor(*block.neighbours, out=block.after)
        np.subtract(step, self.pair, out=step)
        np.right_shift(block.sign, 31, out=block.sign)  # all bits set where it was below 0, else none
        np.bitwise_and(step, _ONE, out=step)
        same[:, 0] = 0.0  # same[i]: slot i is the second of a pair; no pair spans two rows
        np.bitwise_and(key, self.slot_bits, out=key)
        np.add(key, block.base, out=key)
        np.copyto(block.index, key)  # copied here: take() would allocate a copy of the indices for every block
        block.values.take(block.index, out=mixed, mode="wrap")
        np.subtract(mixed, taken, out=second)
        np.multiply(second, same, out=second)
        np.maximum(mixed, same, out=mixed)  # E exceeds 1 by at most a share, which FAST_FLOOR keeps small
        np.add(block.before, block.values[1:], out=block.before)
        np.log(mixed, out=second)
        return same @ self.ones, _dots(mixed, second)


class _Block:
    """The buffers of some rows, [n, W] each, and views of them.

    ``mixed`` first holds the logprobs; ``value`` finally holds the value that follows each slot. ``same`` is ``step``
    in float32.
    """

    def __init__(self, columns: tuple[slice, slice], arrays: tuple[NDArray[Any], ...]) -> None:
        self.columns, self.arrays = columns, arrays
        self.value, self.mixed, self.key, self.step, self.slot, self.base, self.index = arrays
        self.ids, self.same, self.sign = (
            self.key.view(np.int32), self.step.view(np.float32), self.step.view(np.int32),
        )  # fmt: skip
        self.ends = self.mixed[:, columns[0].stop - 1 :: columns[1].stop - columns[1].start]  # last of either list
        self.values, keys = self.value.reshape(-1), self.key.reshape(-1)
        self.neighbours = keys[1:], keys[:-1]
        self.after, self.before = self.step.reshape(-1)[1:], self.mixed.reshape(-1)[:-1]

    @classmethod
    def ready(cls, rows: int, columns: tuple[slice, slice]) -> _Block:
        """Return an idle block of that many rows or more, or a new one."""
        try:
            idle = _IDLE.pop()
        except IndexError:
            idle = None
        if idle is not None and idle.columns == columns and len(idle.key) >= rows:
            return idle
        width = columns[1].stop
        value, mixed = (_allocate_aligned((rows, width), np.float32) for _ in range(2))
        key, step, slot, base = (_allocate_aligned((rows, width), np.uint32) for _ in range(4))
        slot[:] = np.arange(width, dtype=np.uint32)
        base[:] = np.arange(rows, dtype=np.uint32)[:, None] * np.uint32(width)
        return cls(columns, (value, mixed, key, step, slot, base, _allocate_aligned((rows, width), np.intp)))

    def head(self, rows: int) -> _Block:
        """Return the buffers of the first ``rows`` rows."""
        return self if rows == len(self.key) else _Block(self.columns, tuple(array[:rows] for array in self.arrays))


_IDLE: list[_Block] = []  # at most as many as there were concurrent calls; pop and append are atomic


def _allocate_aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Allocate an array that starts at a cache line: a full-width load or store then uses one line, not two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _CACHE_LINE, dtype=np.uint8)
    first = -raw.ctypes.data % _CACHE_LINE
    return raw[first : first + size].view(dtype).reshape(shape)


def _dots(left: Float32, right: Float32) -> Float32:
    """Compute the dot products of the rows."""
    if hasattr(np, "vecdot"):  # NumPy 2
        return np.asarray(np.vecdot(left, right))
    return np.asarray(np.matmul(left[:, None, :], right[:, :, None])[:, 0, 0])


def _finish(teacher: _Side, student: _Side, sums: Float64, fits: Bool) -> tuple[Float64, NDArray[np.intp]]:
    teacher_mass, student_mass, p_log_p, pairs, mixture = sums
    total = teacher.scale * (p_log_p - mixture)
    mixture_tail, log_scale = np.zeros_like(mixture), np.log(teacher.scale)
    left = ~fits
    for side, other, mass in ((teacher, student, teacher_mass), (student, teacher, student_mass)):
        missing = other.listed - pairs
        tail = side.remaining
        unknown = np.isnan(tail)
        if unknown.any():
            tail = np.where(unknown, 1.0 - mass, tail)
        tail = np.maximum(tail, MIN_TAIL)
        tail -= side.share * missing
        left |= mass > 1.0
        left |= tail < 0.0
        tail *= side.weight
        np.maximum(tail, _TINY, out=tail)
        mixture_tail += tail
        # The mixture was summed in units of the scale: subtract its mass times the scale's logarithm.
        total -= (side.weight * log_scale) * mass
        missing *= side.weight * side.share * (np.log(np.maximum(side.share, _TINY)) - log_scale)
        total += missing
        total += tail * np.log(tail) - np.log(side.weight) * tail
    total -= mixture_tail * np.log(mixture_tail)
    np.maximum(total, 0.0, out=total)
    total[left] = np.nan
    # float32 also rounds the mass of very improbable ids to 0. The lists descend, and a pad is -inf.
    for side, mass in ((teacher, teacher_mass), (student, student_mass)):
        silent = np.flatnonzero(mass == 0.0)
        silent = silent[np.isneginf(side.logp[silent, 0])]
        total[silent] = np.nan
        left[silent] = ~fits[silent]
    return total, np.flatnonzero(left)
