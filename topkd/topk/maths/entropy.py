"""What a top-K list says about the teacher's entropy: two bounds, in nats."""

from __future__ import annotations

import numpy as np

from topkd.topk.errors import ConfigError
from topkd.topk.inputs import check_scores
from topkd.topk.maths.scalars import check_integer
from topkd.topk.types import Float64, TopK


def entropy_bounds(teacher: TopK, vocab_size: int) -> tuple[Float64, Float64]:
    """Lower and upper bound of each row's entropy H(T) = -sum_v t log t, in nats, natural log.

    With h = -sum over the list of t log t and r the mass outside it::

        lo = h - r log r                     the rest as one lump
        hi = h - r log(r / (V - K))          the rest spread evenly over the other V - K ids

    so lo <= H <= hi up to the rounding of the list. Used by entropy gates (arXiv:2603.07079), which open for certain
    only where lo >= tau.

    Args:
        teacher: R rows; ``tail_logp`` gives r where it is known, else 1 - mass.
        vocab_size: V, the number of ids the teacher can say.

    Returns:
        ``(lo, hi)``, float64 [R]; NaN for a row that lists nothing (no signal).
    """
    check_scores(teacher=teacher)
    vocab_size = check_integer("vocab_size", vocab_size)
    count = teacher.listed.sum(axis=1)
    if vocab_size < max(1, int(count.max(initial=0))) or (teacher.k and int(teacher.ids.max(initial=-1)) >= vocab_size):
        raise ConfigError(
            "entropy_bounds: vocab_size is smaller than the ids in the list",
            got=vocab_size,
            expected=f"> {int(teacher.ids.max(initial=-1))}",
        )
    logp = teacher.logp.astype(np.float64)
    head = -(np.exp(logp) * np.where(np.isneginf(logp), 0.0, logp)).sum(axis=1)
    stored = np.exp(teacher.tail_logp, dtype=np.float64)
    rest = np.maximum(np.where(np.isnan(stored), 1.0 - teacher.mass(), stored), 0.0)
    others = vocab_size - count
    # With no other id left the rest is rounding: nothing is spread over nothing.
    rest = np.where(others > 0, rest, 0.0)
    lump = -rest * np.log(np.where(rest > 0.0, rest, 1.0))
    low = np.maximum(head + lump, 0.0)
    high = low + rest * np.log(np.maximum(others, 1))
    return np.where(teacher.signal, low, np.nan), np.where(teacher.signal, high, np.nan)
