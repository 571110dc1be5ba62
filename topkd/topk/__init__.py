"""What a top-K logprob is, and all the maths on it.

Knows: probabilities, divergences, advantages, estimators. Does not know: servers, files, clocks, loggers, torch
(but for ``losses``, ``fused`` and ``schedule``, which are imported only by who asks).
"""

from topkd.topk.advantages import forward_kl_advantage, gjs_advantage, scalar_kl_advantage
from topkd.topk.divergence import gjs, shared_support_gjs
from topkd.topk.pairs import topk_gjs
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
    "forward_kl_advantage",
    "gjs",
    "gjs_advantage",
    "scalar_kl_advantage",
    "shared_support_gjs",
    "topk_gjs",
]
