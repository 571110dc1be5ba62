"""Scores for the tests: proper top-K lists, with every oddity a store must keep."""

from __future__ import annotations

import numpy as np

from topkd.topk import TopK
from topkd.topk.types import tail_logp


def scored(
    seed: int, tokens: int = 40, k: int = 8, start: int = 5, vocabulary: int = 151_936, odd: bool = False
) -> tuple[np.ndarray, TopK]:
    """A sequence and its scores; ``odd`` adds holes, pads, exact zeros and unknown values."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, tokens).astype(np.int32)
    rows = tokens - 1 - start
    raw = -np.sort(-rng.normal(0, 3, (rows, max(4 * k, 50))), axis=1)
    logp = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    drawn = [rng.choice(vocabulary, k, replace=False) for _ in range(rows)]
    top = np.array(drawn, np.int32).reshape(rows, k)
    kept, tail = logp[:, :k], tail_logp(logp[:, :k])
    actual = logp[np.arange(rows), rng.integers(0, logp.shape[1], rows)].astype(np.float32)
    kept = kept.astype(np.float32)
    if odd and rows >= 6 and k >= 3:
        top[0], kept[0], tail[0], actual[0] = -1, -np.inf, np.nan, np.nan  # a hole
        top[1, 2:], kept[1, 2:] = -1, -np.inf  # pads
        kept[2, -1] = -np.inf  # an exact zero at a real id
        tail[3] = -np.inf  # nothing left
        actual[4] = -np.inf
        kept[5], tail[5] = np.float32(-np.log(k)), -np.inf  # uniform: rounding to nearest may add mass
    return ids, TopK(start, top, kept, ids[start + 1 :], actual, tail)


def same(a: TopK, b: TopK) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return a == b and all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes()
        for name in ("ids", "logp", "actual_ids", "actual_logp", "tail_logp")
    )


def checked(scores: TopK) -> TopK:
    """The same through the validating constructor: raises when the store returned something that is no TopK."""
    return TopK(
        scores.start,
        scores.ids.copy(),
        scores.logp.copy(),
        scores.actual_ids.copy(),
        scores.actual_logp.copy(),
        scores.tail_logp.copy(),
    )
