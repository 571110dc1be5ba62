"""What may be asked of a store, and put into it."""

from __future__ import annotations

import numpy as np

from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.maths.scalars import check_integer
from topkd.topk.types import Int32, TopK

_LARGEST_K = 2**31 - 1


def check_request(tokens: int, start: int, k: int) -> None:
    """A start within the sequence, and a K."""
    if not 0 <= start < tokens:
        raise ConfigError("score request: start out of range", got=start, expected=f"0..{tokens - 1}")
    if k < 0:
        raise ConfigError("score request: k is negative", got=k)


def check_asked(asked: object) -> int:
    """The K that was asked for; None is 0, what the rows themselves hold."""
    number = 0 if asked is None else check_integer("the K that was asked for", asked)
    if not 0 <= number <= _LARGEST_K:
        raise ConfigError("the K that was asked for is out of range", got=number, expected=f"0..{_LARGEST_K}")
    return number


def check_stored_scores(ids: Int32, scores: TopK) -> None:
    """Rows to the sequence's end, of the sequence's own tokens."""
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
