"""All training losses on torch tensors: policy gradients, divergences, and the top-K estimator, which combines both.

Masks are boolean, means are over valid tokens, the teacher never receives a gradient, logs are natural.
"""

from topkd.topk.losses.cross_entropy import KDLoss, taid_loss
from topkd.topk.losses.entropy import entropy_aware_opd_loss, eopd_loss, teacher_entropy
from topkd.topk.losses.fused_policy import FusedPolicyLoss, fused_topk_policy_gradient_loss
from topkd.topk.losses.jsd import generalized_jsd_loss
from topkd.topk.losses.policy import icepop_loss, importance_sampling_loss, ppo_clip_loss, reinforce_loss
from topkd.topk.losses.sparse import fused_divergence_loss, sparse_divergence_loss
from topkd.topk.losses.sparse_objectives import sparse_entropy_aware_loss, sparse_eopd_loss, sparse_taid_loss
from topkd.topk.losses.teacher import SparseTeacher
from topkd.topk.losses.topk_policy import topk_policy_gradient_loss
from topkd.topk.schedule import TAIDScheduler

__all__ = [
    "FusedPolicyLoss",
    "KDLoss",
    "SparseTeacher",
    "TAIDScheduler",
    "entropy_aware_opd_loss",
    "eopd_loss",
    "fused_divergence_loss",
    "fused_topk_policy_gradient_loss",
    "generalized_jsd_loss",
    "icepop_loss",
    "importance_sampling_loss",
    "ppo_clip_loss",
    "reinforce_loss",
    "sparse_divergence_loss",
    "sparse_entropy_aware_loss",
    "sparse_eopd_loss",
    "sparse_taid_loss",
    "taid_loss",
    "teacher_entropy",
    "topk_policy_gradient_loss",
]
