"""Checks of requests to a store and of scores to be stored."""

from __future__ import annotations

import numpy as np

from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.maths.scalars import check_integer
from topkd.topk.types import Int32, TopK

_LARGEST_K = 2**31 - 1


def check_request(tokens: int, start: int, k: int) -> None:
    """Check a start within the sequence, and a K."""
    if not 0 <= start < tokens:
        raise ConfigError("score request: start out of range", got=start, expected=f"0..{tokens - 1}")
    if k < 0:
        raise ConfigError("score request: k is negative", got=k)


def check_asked_k(asked: object) -> int:
    """Return the requested K; None is 0, the width of the rows themselves."""
    number = 0 if asked is None else check_integer("the K that was asked for", asked)
    if not 0 <= number <= _LARGEST_K:
        raise ConfigError("the K that was asked for is out of range", got=number, expected=f"0..{_LARGEST_K}")
    return number


def check_stored_scores(ids: Int32, scores: TopK) -> None:
    """Check that rows reach the end of the sequence and hold its own tokens."""
    expected = ids.size - 1 - scores.start
    if scores.rows != expected:
        raise AlignmentError("scores do not reach to the end of their sequence", got=scores.rows, expected=expected)
    known = scores.actual_ids >= 0
    wrong = known & (scores.actual_ids != ids[scores.start + 1 :])
    if wrong.any():
        row = int(np.argmax(wrong))
        raise AlignmentError(
            "scores of another sequence",
            where=f"row {row}",
            got=f"token {scores.actual_ids[row]}",
            expected=f"token {ids[scores.start + 1 + row]}",
        )
