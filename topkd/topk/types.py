"""``TopK``: the top-K logprobs at each position, checked once and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.topk.errors import ConfigError, ResponseError
from topkd.topk.maths.ragged import pad_rows
from topkd.topk.maths.scalars import check_integer, check_positive

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

PAD_ID = -1
MASS_TOLERANCE = 1e-3  # rounding of float32 in JSON stays far below; a mass above this is not a distribution
_LOGP_TOLERANCE = 1e-3
_AGREEMENT = 1e-2  # relative, absolute below 1 nat: bfloat16 rounds a logprob by 2**-9 of itself


@dataclass(frozen=True, slots=True)
class TopK:
    """R rows of top-K natural-log probabilities; row i is the distribution of token ``start + i + 1``.

    Attributes:
        start: Source position of row 0. P prompt tokens and R response tokens give ``start = P - 1`` and R rows.
        ids: int32 [R, K], unique in a row, -1 pads at the end of a row.
        logp: float32 [R, K], descending; -inf at pads. -inf at a real id means probability exactly zero.
        actual_ids: int32 [R], the realised token of each row (the token that the sequence has there); -1 = unknown.
        actual_logp: float32 [R], its exact logprob; NaN = unknown. It is never floored or looked up in the list.
        tail_logp: float32 [R], log of the mass outside the list, from unrounded values; NaN = unknown.

    A row with an empty list is a hole: it has no signal and must be masked. Arrays are read-only; they are copied only
    if dtype or layout require it.
    """

    start: int
    ids: Int32
    logp: Float32
    actual_ids: Int32
    actual_logp: Float32
    tail_logp: Float32

    def __post_init__(self) -> None:
        for name, dtype in _FIELDS.items():
            object.__setattr__(self, name, _freeze(name, getattr(self, name), dtype))
        _check(self)

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return int(self.ids.shape[0])

    @property
    def k(self) -> int:
        """Width K of the lists (pads included)."""
        return int(self.ids.shape[1])

    @property
    def listed(self) -> Bool:
        """Whether an entry holds an id, bool [R, K] (False at pads)."""
        return np.asarray(self.ids >= 0)

    @property
    def signal(self) -> Bool:
        """Whether a row lists at least one id with non-zero probability, bool [R]."""
        return np.asarray(np.isfinite(self.logp).any(axis=1))

    def mass(self) -> Float64:
        """Compute the probability mass in each row's list, sum_k exp(logp_k), float64 [R]."""
        return np.asarray(np.exp(self.logp, dtype=np.float64).sum(axis=1))

    def tail_mass(self) -> Float64:
        """Compute the mass outside each row's list: the stored tail where it is known, else 1 - mass; float64 [R]."""
        tail = np.exp(self.tail_logp, dtype=np.float64)
        return np.where(np.isnan(tail), 1.0 - self.mass(), tail)

    def ceiling(self) -> Float64:
        """Bound the *probability* of an id that the row does not list: min(p_K, 1 - mass), float64 [R].

        p_K is the smallest listed probability, 1 - mass the stored tail where it is known. NaN for a hole.
        """
        if not self.k:
            return np.full(self.rows, np.nan)
        counts = self.listed.sum(axis=1)
        last = np.take_along_axis(self.logp, np.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
        bound = np.minimum(np.exp(last, dtype=np.float64), np.maximum(self.tail_mass(), 0.0))
        return np.where(counts > 0, bound, np.nan)

    def at(self, ids: ArrayLike) -> tuple[Float32, Bool]:
        """Return log-probabilities at chosen ids, and where they are known.

        Args:
            ids: int [R] or [R, M]; negative ids are never known.

        Returns:
            ``(logp, known)`` of the shape of ``ids``. Known are listed ids and the realised token, for which
            ``actual_logp`` is used and not the list. Unknown entries are NaN; ``ceiling()`` bounds them.
        """
        wanted = np.asarray(ids)
        if wanted.ndim not in (1, 2) or wanted.shape[0] != self.rows or (wanted.size and wanted.dtype.kind not in "iu"):
            raise ConfigError(
                "TopK.at: ids of the wrong shape or type",
                got=f"{wanted.dtype} {wanted.shape}",
                expected=f"integers [{self.rows}] or [{self.rows}, M]",
            )
        columns = wanted[:, None] if wanted.ndim == 1 else wanted
        logp = np.full(columns.shape, np.nan, dtype=np.float32)
        for k in range(self.k):  # K passes over [R, M]: small, and no sort of the list is needed
            hit = (columns == self.ids[:, k, None]) & (columns >= 0)
            np.copyto(logp, self.logp[:, k, None], where=hit)
        exact = (columns == self.actual_ids[:, None]) & (columns >= 0) & ~np.isnan(self.actual_logp)[:, None]
        np.copyto(logp, self.actual_logp[:, None], where=exact)
        return logp.reshape(wanted.shape), ~np.isnan(logp.reshape(wanted.shape))

    def take(self, rows: NDArray[np.intp]) -> TopK:
        """Select rows by index; ``start`` becomes 0, because they need not be adjacent."""
        return TopK(0, *(getattr(self, name)[rows] for name in _FIELDS))

    def slice(self, rows: slice | None = None, *, k: int | None = None) -> TopK:
        """Select rows, or the most probable entries, or both.

        Args:
            rows: Row range (step 1); ``start`` is moved to its first row.
            k: Keep the k most probable entries; the dropped mass is added to ``tail_logp``.
        """
        if not isinstance(rows, slice | None):
            raise ConfigError("TopK.slice: rows must be a slice", got=repr(rows), hint="slice(i, i + 1) for row i")
        first, stop, step = (rows or slice(None)).indices(self.rows)
        if step != 1:
            raise ConfigError("TopK.slice: only contiguous rows keep their source positions", got=f"step {step}")
        if k is not None:
            check_positive("TopK.slice: k", k)
        part = slice(first, max(first, stop))
        ids, logp, tail = self.ids[part], self.logp[part], self.tail_logp[part]
        if k is not None and k < self.k:
            dropped = np.exp(logp[:, k:], dtype=np.float64).sum(axis=1) + np.exp(tail, dtype=np.float64)
            with np.errstate(divide="ignore"):
                tail = np.log(dropped).astype(np.float32)
            ids, logp = ids[:, :k], logp[:, :k]
        return TopK(self.start + first, ids, logp, self.actual_ids[part], self.actual_logp[part], tail)

    def within(self, vocab_size: int) -> TopK:
        """Drop ids from ``vocab_size`` on (a padded teacher vocabulary); their mass is added to the tail."""
        outside = self.ids >= vocab_size
        if not outside.any():
            return self
        dropped = np.exp(np.where(outside, self.logp, -np.inf), dtype=np.float64).sum(axis=1)
        logp = np.where(outside, np.float32(-np.inf), self.logp)
        order = np.argsort(~self.listed | outside, axis=1, kind="stable")
        ids = np.where(outside, np.int32(PAD_ID), self.ids)
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(self.tail_logp, dtype=np.float64) + dropped).astype(np.float32)
        ids, logp = (np.take_along_axis(array, order, axis=1) for array in (ids, logp))
        return TopK(self.start, ids, logp, self.actual_ids, self.actual_logp, tail)

    @classmethod
    def from_lists(
        cls,
        positions: Sequence[Sequence[tuple[int, float]] | None],
        *,
        start: int = 0,
        actual_ids: ArrayLike | None = None,
        actual_logp: ArrayLike | None = None,
    ) -> TopK:
        """Build from lists of (id, logprob), one list per position, in any order.

        NaN entries are dropped, a repeated id keeps its larger logprob, an empty list or None is a hole, and rows are
        padded to the longest list. The tail mass is computed from the unrounded input. The caller must replace special
        values such as -9999, whose meaning differs between servers.

        Raises:
            ResponseError: A value is invalid, or a list contradicts its row's ``actual_logp``.
        """
        ids, logp = pad_rows("TopK.from_lists", positions, PAD_ID)
        scores = cls(
            start,
            ids,
            logp.astype(np.float32),
            np.full(len(ids), PAD_ID, dtype=np.int32) if actual_ids is None else np.asarray(actual_ids),
            np.full(len(ids), np.nan, dtype=np.float32) if actual_logp is None else np.asarray(actual_logp),
            tail_logp(logp),
        )
        _check_realised(scores)
        return scores

    @classmethod
    def concat(cls, parts: Sequence[TopK]) -> TopK:
        """Concatenate the rows of several scores (a flattened ragged batch), padded to the widest list.

        ``start`` is 0: the rows of different sequences have no common source position.
        """
        if isinstance(parts, TopK) or not all(isinstance(part, TopK) for part in parts):
            raise ConfigError("TopK.concat: not a sequence of TopK", got=type(parts).__name__)
        width = max((part.k for part in parts), default=0)

        def wide(part: TopK) -> tuple[Int32, Float32]:
            ids = np.full((part.rows, width), PAD_ID, dtype=np.int32)
            logp = np.full((part.rows, width), -np.inf, dtype=np.float32)
            ids[:, : part.k], logp[:, : part.k] = part.ids, part.logp
            return ids, logp

        if not parts:
            return cls.from_lists([])
        lists = [wide(part) for part in parts]
        return cls(
            0,
            np.concatenate([ids for ids, _ in lists]),
            np.concatenate([logp for _, logp in lists]),
            np.concatenate([part.actual_ids for part in parts]),
            np.concatenate([part.actual_logp for part in parts]),
            np.concatenate([part.tail_logp for part in parts]),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TopK):
            return NotImplemented
        return self.start == other.start and all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=dtype is np.float32)
            for name, dtype in _FIELDS.items()
        )

    __hash__ = None  # type: ignore[assignment]  # arrays: equality by value, no hash


_FIELDS: dict[str, Any] = {
    "ids": np.int32,
    "logp": np.float32,
    "actual_ids": np.int32,
    "actual_logp": np.float32,
    "tail_logp": np.float32,
}


def tail_logp(logp: ArrayLike) -> Float32:
    """Compute log(1 - sum_k exp(logp_k)) over the last axis; -inf if nothing is left, NaN for a hole.

    Pass unrounded float64: from values rounded to 16 bits, the tail is wrong by up to several nats.
    """
    values = np.asarray(logp, dtype=np.float64)
    mass = np.exp(values).sum(axis=-1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1.0 - mass, 0.0))
    return np.where(np.isfinite(values).any(axis=-1), tail, np.nan).astype(np.float32)


def _freeze(name: str, value: object, dtype: type[np.generic]) -> NDArray[Any]:
    array = np.asarray(value)
    wanted = "iu" if dtype is np.int32 else "iuf"
    if array.dtype.kind not in wanted and array.size:
        raise ConfigError(f"TopK.{name}: wrong dtype", got=array.dtype, expected=np.dtype(dtype))
    if dtype is np.int32 and array.size and (array.max() > np.iinfo(np.int32).max or array.min() < PAD_ID):
        raise ResponseError(
            f"TopK.{name}: token id out of range", got=f"{array.min()}..{array.max()}", expected="-1..2**31-1"
        )
    if array.dtype != dtype or array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=dtype, order="C")
        array.flags.writeable = False
    return array


def _check(topk: TopK) -> None:
    rows = topk.ids.shape[0] if topk.ids.ndim == 2 else -1
    if rows < 0 or topk.logp.shape != topk.ids.shape:
        raise ConfigError("TopK: ids and logp must be [R, K]", got=f"ids {topk.ids.shape}, logp {topk.logp.shape}")
    for name in ("actual_ids", "actual_logp", "tail_logp"):
        if getattr(topk, name).shape != (rows,):
            raise ConfigError(f"TopK.{name}: wrong shape", got=getattr(topk, name).shape, expected=(rows,))
    if check_integer("TopK.start", topk.start) < 0:
        raise ConfigError("TopK.start must be at least 0", got=topk.start)
    listed = topk.ids >= 0
    _refuse(np.isnan(topk.logp), topk, "logprob is NaN")
    _refuse(topk.logp > _LOGP_TOLERANCE, topk, "logprob above 0")
    _refuse(~listed & (topk.logp > -np.inf), topk, "a pad (-1) has a logprob; pads must have -inf")
    if topk.k > 1:
        with np.errstate(invalid="ignore"):
            _refuse(topk.logp[:, 1:] > topk.logp[:, :-1], topk, "logprobs are not in descending order")
        _refuse(listed[:, 1:] & ~listed[:, :-1], topk, "a pad (-1) comes before a listed id")
        ordered = np.sort(topk.ids, axis=1)
        _refuse((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), topk, "an id is listed twice")
    _refuse((topk.mass() > 1 + MASS_TOLERANCE)[:, None], topk, f"mass above 1 + {MASS_TOLERANCE}")
    _refuse((topk.actual_logp > _LOGP_TOLERANCE)[:, None], topk, "realised token's logprob above 0")
    _refuse((topk.tail_logp > _LOGP_TOLERANCE)[:, None], topk, "tail_logp above 0")


def _check_realised(scores: TopK) -> None:
    """Raise ResponseError if a list has another logprob for the realised token than ``actual_logp``."""
    actual = scores.actual_logp.astype(np.float64)
    same = scores.listed & (scores.ids == scores.actual_ids[:, None])
    listed = np.where(same, scores.logp, -np.inf).max(axis=1, initial=-np.inf).astype(np.float64)
    tolerance = _AGREEMENT * np.maximum(1.0, np.minimum(np.abs(actual), np.abs(listed)))
    with np.errstate(invalid="ignore"):  # -inf - -inf
        close = (actual == listed) | (np.abs(actual - listed) <= tolerance)
    wrong = same.any(axis=1) & ~np.isnan(actual) & ~close
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ResponseError(
            "TopK: the list and actual_logp disagree",
            where=f"row {row} of {scores.rows}, token {scores.actual_ids[row]}",
            got=f"actual_logp {actual[row]:.6g}",
            expected=f"{listed[row]:.6g}, as in the list",
            hint="do both belong to the same position?",
        )


def _refuse(bad: NDArray[np.bool_], topk: TopK, what: str) -> None:
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ResponseError(
            f"TopK: {what}",
            where=f"row {row} of {topk.rows}, source position {topk.start + row}",
            got=f"ids {topk.ids[row, :4].tolist()}.. logp {topk.logp[row, :4].tolist()}..",
        )
