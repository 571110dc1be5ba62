"""Checks of requests and replies that all dialects share. Pure: arrays in, a checked ``TopK`` out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import AlignmentError, ConfigError, ResponseError
from topkd.topk.protocols import Ids
from topkd.topk.types import MASS_TOLERANCE, PAD_ID, Bool, Float32, Float64, Int32, TopK, tail_logp

LOWEST = -9000.0  # vLLM writes -inf as -9999.0: no softmax output in float32 or float64 comes near
_ABOVE_ZERO = 1e-3
_SAME = 1e-3
_FLOAT_LOWEST = -1e30  # dialects turn their sentinels for zero probability into -inf before
_LAST = np.int32(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True)
class Entries:
    """What a decoder read: R rows of unordered entries.

    Attributes:
        ids: int32 [R, W], -1 where a row has fewer entries.
        logp: float64 [R, W], as served (sentinels included); -inf at pads.
        rank: int32 [R], the served rank of the realised token; 0 where the server gives none.
    """

    ids: Int32
    logp: Float64
    rank: Int32


@dataclass(frozen=True, slots=True)
class Ranked:
    """What a fast decoder read and already checked: R rows of exactly K, the realised token of each identified.

    Attributes:
        ids: int32 [R, K], by rank.
        logp: float64 [R, K], as served.
        actual_logp: float64 [R], of the realised token, as served.
        extra: bool [R], True where the realised token came on top of the K.
    """

    ids: Int32
    logp: Float64
    actual_logp: Float64
    extra: Bool


def check_request_ids(ids: Ids, start: int, k: int, vocab_size: int | None = None) -> Int32:
    """Return the ids to score as int32; refuse what no server could score.

    Raises:
        ConfigError: fewer than start + 2 ids, a negative start or k, or an id outside the vocabulary.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ConfigError("token ids must be a flat sequence of integers", got=f"{array.dtype} {array.shape}")
    if start < 0 or array.size < start + 2:
        raise ConfigError(
            "nothing to score", got=f"{array.size} ids, start {start}", expected="start >= 0 and at least start + 2 ids"
        )
    if k < 0:
        raise ConfigError("k must be at least 0", got=k)
    check_vocabulary(array, vocab_size)
    return array.astype(np.int32)


def prepare_candidates(candidates: Int32, rows: int, vocab_size: int | None = None) -> Int32:
    """Return candidate ids [rows, K] (-1 pads) as int32; refuse another shape and ids the model cannot have."""
    ids = np.asarray(candidates)
    if ids.ndim != 2 or ids.shape[0] != rows or ids.shape[1] < 1 or ids.dtype.kind not in "iu":
        raise ConfigError("candidates of the wrong shape", got=f"{ids.dtype} {ids.shape}", expected=f"[{rows}, K]")
    check_vocabulary(np.where(ids == PAD_ID, 0, ids).ravel(), vocab_size)
    return ids.astype(np.int32)


def check_vocabulary(ids: NDArray[np.integer], vocab_size: int | None) -> None:
    """Refuse a request with ids that the model cannot have."""
    top = np.iinfo(np.int32).max if vocab_size is None else vocab_size - 1
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > top):
        at = int(np.argmax((ids < 0) | (ids > top)))
        raise ConfigError(
            "token id outside the vocabulary",
            where=f"position {at}",
            got=int(ids[at]),
            expected=f"0..{top}",
            hint="" if vocab_size is None else "are these another tokenizer's ids, or is vocab_size too small?",
        )


def build_scores(entries: Entries, ids: Int32, start: int, k: int, vocab_size: int | None = None) -> tuple[TopK, int]:
    """Check a reply of K or K + 1 entries per row (vLLM's form); return it and its count of -inf sentinels.

    A row lists the top K; the realised token is among them, or is one more entry that no entry lies below. It is found
    by its id, never by its place.

    Raises:
        AlignmentError: wrong number of rows, or a row that does not score ``ids[start + 1 + i]``.
        ResponseError: fewer or more entries, mass above 1, NaN, an id outside the vocabulary or listed twice.
    """
    actual = ids[start + 1 :]
    check_reply_rows(entries.ids.shape[0], actual.size)
    listed = np.asarray(entries.ids >= 0)
    _check_values(entries.ids, entries.logp, start, vocab_size)
    _refuse(
        listed & np.isneginf(entries.logp), entries.logp, start, "a logprob is -inf", "a number: JSON has no infinity"
    )
    zero = listed & (entries.logp <= LOWEST)
    zeros = int(np.count_nonzero(zero))
    logp = np.where(zero, -np.inf, entries.logp) if zeros else entries.logp
    hit = np.asarray(entries.ids == actual[:, None])
    column = hit.argmax(axis=1)
    rows = np.arange(actual.size)
    row = _first(~hit[rows, column])
    if row is not None:
        got, expected = f"ids {entries.ids[row, :4].tolist()}..", f"token {int(actual[row])} among them"
        raise AlignmentError("the realised token is not in its row", where=_at(row, start), got=got, expected=expected)
    actual_logp = logp[rows, column]
    want = k if vocab_size is None else min(k, vocab_size)
    extra = _extra(entries, listed, logp, actual_logp, start=start, want=want)
    kept_ids = entries.ids
    if extra.any():
        drop = extra[:, None] & hit
        kept_ids, logp = np.where(drop, PAD_ID, kept_ids), np.where(drop, -np.inf, logp)
    return build_sorted_scores(kept_ids, logp, start=start, k=want, actual_ids=actual, actual_logp=actual_logp), zeros


def build_ranked_scores(rows: Ranked, ids: Int32, start: int, vocab_size: int | None = None) -> tuple[TopK, int]:
    """Check the rows of a fast decoder likewise."""
    _check_values(rows.ids, rows.logp, start, vocab_size)
    _check_values(ids[start + 1 :, None], rows.actual_logp[:, None], start, vocab_size)
    logp, actual_logp = rows.logp, rows.actual_logp
    zeros = 0
    if min(actual_logp.min(initial=0.0), logp.min(initial=0.0)) <= LOWEST:
        zero, actual_zero = logp <= LOWEST, actual_logp <= LOWEST
        zeros = int(np.count_nonzero(zero) + np.count_nonzero(actual_zero & rows.extra))
        logp, actual_logp = np.where(zero, -np.inf, logp), np.where(actual_zero, -np.inf, actual_logp)
    k = rows.ids.shape[1]
    return build_sorted_scores(
        rows.ids, logp, start=start, k=k, actual_ids=ids[start + 1 :], actual_logp=actual_logp
    ), zeros


def _extra(entries: Entries, listed: Bool, logp: Float64, actual_logp: Float64, *, start: int, want: int) -> Bool:
    """Find the rows whose realised token comes on top of the K; refuse rows of neither K nor K + 1 entries."""
    counts = listed.sum(axis=1)
    extra = np.asarray(counts == want + 1)
    row = _first((counts != want) & ~extra)
    if row is not None:
        expected = f"K = {want}, or one more with the realised token"
        raise ResponseError("wrong number of entries", where=_at(row, start), got=int(counts[row]), expected=expected)
    row = _first(~extra & (entries.rank > want))
    if row is not None:
        got = f"{want} entries with the realised token at rank {int(entries.rank[row])}"
        raise ResponseError("a top-K entry is missing", where=_at(row, start), got=got, expected=f"{want + 1} entries")
    if extra.any():
        row = _first(extra & (actual_logp > np.where(listed, logp, np.inf).min(axis=1)))
        if row is not None:
            got = f"{want + 1}, and the realised token is not the least probable"
            raise ResponseError("one entry too many", where=_at(row, start), got=got, expected=want)
    return extra


def build_sorted_scores(
    ids: Int32, logp: Float64, *, start: int, k: int, actual_ids: Int32, actual_logp: Float64 | Float32
) -> TopK:
    """Sort entries by logprob, ties by id, and cut them to ``k`` columns (pads last)."""
    width = ids.shape[1]
    if width > 1:
        left, right = logp[:, :-1], logp[:, 1:]
        late = np.where(ids < 0, _LAST, ids)  # a pad sorts behind an entry of probability zero
        wrong = np.asarray(((right > left) | ((right == left) & (late[:, 1:] < late[:, :-1]))).any(axis=1))
        if wrong.any():
            rows = np.flatnonzero(wrong)
            order = np.lexsort((late[rows], -logp[rows]), axis=1)
            ids, logp = ids.copy(), logp.copy()
            ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
            logp[rows] = np.take_along_axis(logp[rows], order, axis=1)
    if width < k:
        ids = np.pad(ids, ((0, 0), (0, k - width)), constant_values=PAD_ID)
        logp = np.pad(logp, ((0, 0), (0, k - width)), constant_values=-np.inf)
    ids, logp = ids[:, :k], logp[:, :k]
    return TopK(
        start, ids, logp.astype(np.float32), actual_ids, np.asarray(actual_logp, dtype=np.float32), tail_logp(logp)
    )


def topk_with_actual(ids: Int32, logp: Float64, *, start: int, k: int, actual_ids: Int32, actual_logp: Float64) -> TopK:
    """Join lists (-1 pads) and realised tokens that were served apart, after a check that they agree.

    A realised token that is listed must have one logprob, and one that is not must not beat the list: rows that belong
    to another position break this almost surely.

    Raises:
        AlignmentError: they contradict each other.
        ResponseError: a value that is no logprob.
    """
    for values in (logp, actual_logp):
        bad = np.isnan(values) | (values > _SAME) | ((values < _FLOAT_LOWEST) & ~np.isneginf(values))
        if bad.any():
            raise ResponseError("a logprob is invalid", got=float(values[bad][0]), expected="a number <= 0")
    topk = build_sorted_scores(ids, logp, start=start, k=k, actual_ids=actual_ids, actual_logp=actual_logp)
    if not topk.k:
        return topk
    hit = topk.ids == topk.actual_ids[:, None]
    inside = hit.any(axis=1)
    listed = np.where(hit, topk.logp, -np.inf).max(axis=1)
    with np.errstate(invalid="ignore"):
        differs = inside & (np.abs(listed - topk.actual_logp) > _SAME)
        # Only a full list says that everything outside it is less probable.
        beats = ~inside & topk.listed.all(axis=1) & (topk.actual_logp > topk.logp[:, -1] + _SAME)
    wrong = differs | beats
    if wrong.any():
        row = int(np.argmax(wrong))
        other = float(listed[row] if inside[row] else topk.logp[row, -1])
        raise AlignmentError(
            "the list and the realised token's logprob contradict each other",
            where=f"row {row}, predicting position {start + row + 1}",
            got=f"{float(topk.actual_logp[row]):.6g} and {other:.6g}",
        )
    return topk


def check_candidates(values: Float32, wanted: Int32, start: int) -> Float32:
    """Refuse candidates' logprobs [R, K] whose pads are not -inf, or whose distinct ids exceed all probability."""
    pads = wanted < 0
    if not np.isneginf(values[pads]).all():
        raise ResponseError("a pad (-1) of the candidates came back with a logprob")
    order = np.argsort(wanted, axis=1, kind="stable")
    ids, logp = np.take_along_axis(wanted, order, axis=1), np.take_along_axis(values, order, axis=1)
    p = np.exp(logp, dtype=np.float64)
    p[:, 1:][ids[:, 1:] == ids[:, :-1]] = 0.0
    mass = p.sum(axis=1)
    if (mass > 1 + MASS_TOLERANCE).any():
        row = int(np.argmax(mass > 1 + MASS_TOLERANCE))
        raise ResponseError(
            "the probabilities of the candidates add up to more than 1",
            where=f"row {row}, position {start + row + 1}",
            got=mass[row],
        )
    return values


def check_reply_rows(got: int, expected: int) -> None:
    """Refuse a reply that is a row short or long."""
    if got != expected:
        raise AlignmentError(
            "wrong number of rows",
            got=got,
            expected=expected,
            hint="was the prompt truncated, or does a proxy change the request?",
        )


def check_reply_vocabulary(ids: Int32, vocab_size: int | None, where: str = "") -> None:
    """Refuse a reply with ids that the model cannot have."""
    if vocab_size is not None and ids.size and int(ids.max()) >= vocab_size:
        raise ResponseError(
            "id outside the vocabulary", where=where, got=int(ids.max()), expected=f"below {vocab_size}"
        )


def _check_values(ids: Int32, logp: Float64, start: int, vocab_size: int | None) -> None:
    if vocab_size is not None:
        _refuse(ids >= vocab_size, ids, start, "id outside the vocabulary", f"below {vocab_size}")
    _refuse(np.isnan(logp), logp, start, "a logprob is NaN", "a number")
    _refuse(logp > _ABOVE_ZERO, logp, start, "a logprob is above 0", "<= 0; does the server return logits?")


def _refuse(bad: NDArray[Any], values: NDArray[Any], start: int, what: str, expected: str) -> None:
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ResponseError(what, where=_at(row, start), got=values[row, column].item(), expected=expected)


def _first(bad: NDArray[Any]) -> int | None:
    return int(np.argmax(bad)) if bad.any() else None


def _at(row: int, start: int) -> str:
    return f"row {row}, predicting position {start + row + 1}"
