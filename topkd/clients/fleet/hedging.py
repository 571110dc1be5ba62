"""When a slow score is asked a second time of another replica: after the 95th percentile, for a small share of all."""

from __future__ import annotations

from collections import deque

import numpy as np

_KNOWN = 64  # replies before a percentile means anything
_KEPT = 256
_FIXED_TOKENS = 64  # what a request costs beside its tokens, in tokens: keeps short ones comparable with long ones
_SAVED = 8.0  # hedges that may be saved up in quiet times


class Hedging:
    """The budget and the patience of a fleet's hedges; one per fleet, used from its loop.

    Latencies are compared per token, because a long prompt is slow everywhere.

    Args:
        share: Hedges per score, at most; 0 switches hedging off.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._credit = 0.0
        self._rates: deque[float] = deque(maxlen=_KEPT)

    def patience_s(self, tokens: int) -> float | None:
        """Seconds to wait for a score of ``tokens`` before it may be hedged; None when it may not."""
        if not self.share or len(self._rates) < _KNOWN:
            return None
        return float(np.percentile(self._rates, 95)) * (tokens + _FIXED_TOKENS)

    def answered(self, seconds: float, tokens: int) -> None:
        """A score came back after ``seconds``: it is known how fast the fleet is, and a little more may be hedged."""
        self._rates.append(seconds / (tokens + _FIXED_TOKENS))
        self._credit = min(_SAVED, self._credit + self.share)

    def spend(self) -> bool:
        """Takes one hedge from the budget; False when there is none left."""
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True
