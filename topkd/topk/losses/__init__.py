"""Every training loss on torch tensors: policy gradients, divergences, and the top-K estimator between them.

Masks are boolean, means are over valid tokens, the teacher never receives a gradient, logs are natural.
"""

from topkd.topk.losses.policy import icepop_loss, importance_sampling_loss, ppo_clip_loss, reinforce_loss

__all__ = [
    "icepop_loss",
    "importance_sampling_loss",
    "ppo_clip_loss",
    "reinforce_loss",
]
