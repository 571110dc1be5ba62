"""What a top-K logprob is, and all the maths on it.

Knows: probabilities, divergences, advantages, estimators. Does not know: servers, files, clocks, loggers, torch
(but for ``losses``, ``fused`` and ``schedule``, which are imported only by who asks).
"""

from topkd.topk.samples import (
    Behavior,
    PreparedSample,
    Rollout,
    SampleCore,
    SamplingParams,
    ScalarBehavior,
    ScalarPreparedSample,
    TopKBehavior,
    TopKPreparedSample,
)
from topkd.topk.types import TopK

__all__ = [
    "Behavior",
    "PreparedSample",
    "Rollout",
    "SampleCore",
    "SamplingParams",
    "ScalarBehavior",
    "ScalarPreparedSample",
    "TopK",
    "TopKBehavior",
    "TopKPreparedSample",
]
