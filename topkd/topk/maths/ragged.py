"""Build rectangular arrays from lists of (id, logprob) of any length: sorted, each id once, pads at the end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import index, itemgetter, neg

import numpy as np
from numpy.typing import NDArray

from topkd.topk.errors import ConfigError, ResponseError

_LARGEST_ID = np.iinfo(np.int32).max


def pad_rows(
    name: str, positions: Sequence[Sequence[tuple[int, float]] | None], pad_id: int
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return ids [R, K] and logprobs [R, K], most probable first.

    The longest list sets K; shorter ones end in ``pad_id`` (negative) and -inf. NaN entries are dropped, a repeated id
    keeps its larger logprob, ties are in the order of their ids, None is an empty list. No pass over the entries is a
    Python loop.
    """
    count, rows, ids, logp = _flat(name, positions)
    kept = ~(np.isnan(logp) | ((ids == pad_id) & np.isneginf(logp)))
    rows, ids, logp = rows[kept], ids[kept], logp[kept]
    outside = (ids < 0) | (ids > _LARGEST_ID)
    if outside.any():
        place = int(np.argmax(outside))
        raise ResponseError(
            f"{name}: token id out of range", where=f"position {rows[place]}", got=ids[place], expected="0..2**31-1"
        )
    lengths = np.bincount(rows, minlength=count)
    columns = np.arange(rows.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wide_ids = np.full((count, int(lengths.max(initial=0))), pad_id, dtype=np.int32)
    wide_logp = np.full(wide_ids.shape, -np.inf)
    wide_ids[rows, columns], wide_logp[rows, columns] = ids, logp
    wide_ids, wide_logp = _sort_rows(wide_ids, wide_logp, np.lexsort((-wide_logp, wide_ids), axis=1))
    again = wide_ids[:, 1:] == wide_ids[:, :-1]
    wide_ids[:, 1:][again], wide_logp[:, 1:][again] = pad_id, -np.inf
    wide_ids, wide_logp = _sort_rows(wide_ids, wide_logp, np.lexsort((wide_ids, -wide_logp, wide_ids < 0), axis=1))
    width = int((wide_ids >= 0).sum(axis=1).max(initial=0))
    return wide_ids[:, :width], wide_logp[:, :width]


def _sort_rows(
    ids: NDArray[np.int32], logp: NDArray[np.float64], order: NDArray[np.intp]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logp, order, axis=1)


def _flat(
    name: str, positions: Sequence[Sequence[tuple[int, float]] | None]
) -> tuple[int, NDArray[np.intp], NDArray[np.int64], NDArray[np.float64]]:
    """Return the number of positions, and position, id and logprob of every entry."""
    try:
        lists = [() if position is None else position for position in positions]
        lengths = np.fromiter(map(len, lists), dtype=np.intp, count=len(lists))
        entries = list(chain.from_iterable(lists))
        if not all(map((2).__eq__, map(len, entries))):
            raise TypeError("an entry is not a pair")  # noqa: TRY301 - reported like every other malformed entry
        # index: an id of 1.5 must not become 1. neg: refuses text, also where float() could read it
        ids = np.fromiter(map(index, map(itemgetter(0), entries)), dtype=np.int64, count=len(entries))
        logp = -np.fromiter(map(neg, map(itemgetter(1), entries)), dtype=np.float64, count=len(entries))
    except OverflowError as error:
        raise ResponseError(f"{name}: token id out of range", got=error, expected="0..2**31-1") from error
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{name}: not lists of (id, logprob)",
            got=error,
            expected="[[(id, logprob), ...], ...], one list (or None) per position",
        ) from error
    return len(lists), np.repeat(np.arange(len(lists)), lengths), ids, logp
