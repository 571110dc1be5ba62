"""Top-K logprobs: types, errors, protocols, and all the maths.

Knows: probabilities, divergences, advantages, estimators. Does not know: servers, files, clocks, loggers, torch (except
in ``losses`` and ``fused``, which are imported only when needed).
"""

from topkd.topk.compat import compute_topk_gjs, extract_token_logprobs, slice_completion_topk
from topkd.topk.maths.advantages import forward_kl_advantage, gjs_advantage, kl_k1, kl_k3, scalar_kl_advantage
from topkd.topk.maths.baselines import discounted_return, topk_value_baseline, value_baseline
from topkd.topk.maths.divergence import gjs, shared_support_gjs
from topkd.topk.maths.estimator import gated_rows, topk_weights
from topkd.topk.maths.mass import entropy_bounds
from topkd.topk.maths.pairs import topk_gjs
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
    "compute_topk_gjs",
    "discounted_return",
    "entropy_bounds",
    "extract_token_logprobs",
    "forward_kl_advantage",
    "gated_rows",
    "gjs",
    "gjs_advantage",
    "kl_k1",
    "kl_k3",
    "scalar_kl_advantage",
    "shared_support_gjs",
    "slice_completion_topk",
    "topk_gjs",
    "topk_value_baseline",
    "topk_weights",
    "value_baseline",
]
