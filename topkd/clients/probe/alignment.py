"""The alignment self-test: are a server's scores about the tokens they claim to be about? Pure.

A completion is drawn together with its logprobs, then scored. The two must agree token by token. Some servers answer
scoring requests in the right shape with rows that belong to the neighbouring token; nothing in one reply shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topkd.topk.types import Float32, Int32, TopK

EXACT = 5e-3  # above float32 noise over thousands of tokens, below a systematic error of 0.01
NOISE = 0.3  # 16-bit servers differ by up to this between prefill and decoding; other rows differ by nats


@dataclass(frozen=True, slots=True)
class Alignment:
    """How scores compare with the logprobs that the same tokens were drawn with.

    Attributes:
        tokens: Compared.
        worst: Largest absolute difference, in nats; NaN when nothing could be compared.
        shift: 0 when the rows are where they should be, +1 when row i is about the token *after* its own, -1 when it
            is about the one before; None when they fit nowhere.
    """

    tokens: int
    worst: float
    shift: int | None

    @property
    def aligned(self) -> bool:
        """True when the rows are where they should be."""
        return self.shift == 0


def check_alignment(scores: TopK, tokens: Int32, drawn_logp: Float32) -> Alignment:
    """Compares scored rows with drawn logprobs.

    Args:
        scores: Rows whose last ``len(tokens)`` claim to predict ``tokens``.
        tokens: int32 [C], the drawn completion.
        drawn_logp: float32 [C], the logprobs it was drawn with.
    """
    first = scores.rows - tokens.size
    if tokens.size == 0 or first < 0:
        return Alignment(0, float("nan"), None)
    differences = np.abs(scores.actual_logp[first:].astype(np.float64) - drawn_logp)
    if not np.isfinite(differences).all():
        return Alignment(int(tokens.size), float("nan"), None)
    worst = float(differences.max())
    if worst <= NOISE:
        return Alignment(int(tokens.size), worst, 0)
    for shift in (1, -1):
        if _fits(scores, first - shift, tokens, drawn_logp):
            return Alignment(int(tokens.size), worst, shift)
    return Alignment(int(tokens.size), worst, None)


def _fits(scores: TopK, first: int, tokens: Int32, drawn_logp: Float32) -> bool:
    """Whether rows ``first ..`` list the tokens with the logprobs they were drawn with, wherever both are known."""
    rows: NDArray[np.intp] = np.arange(tokens.size) + first
    inside = (rows >= 0) & (rows < scores.rows)
    hit = scores.ids[rows[inside]] == tokens[inside][:, None]
    listed = hit.any(axis=1)
    logp = np.where(hit, scores.logp[rows[inside]], -np.inf).max(axis=1)
    close = np.abs(logp[listed] - drawn_logp[inside][listed]) <= NOISE
    return bool(listed.any() and close.all())
