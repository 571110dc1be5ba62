"""Inputs of a loss: the student's logprobs of a micro-batch (differentiable), and the teacher's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from torch import Tensor

from topkd.engine.config.learner import ImportanceSampling
from topkd.engine.learner.batching import MicroBatch
from topkd.topk.errors import ConfigError
from topkd.topk.losses import SparseTeacher
from topkd.topk.samples import PreparedSample, TopKPreparedSample
from topkd.topk.types import Float32, Float64, TopK


@dataclass(frozen=True, slots=True)
class TokenView:
    """The N trained tokens of a micro-batch: complete sequences, one after another.

    Attributes:
        logp_at_ids: float32 [N, K], differentiable: exact log s at the teacher's listed ids, -inf at pads.
        logp_new: float32 [N], differentiable: exact log s of the realised token.
        teacher: The teacher's rows: lists (K = 0 where the objective needs none), tails, realised tokens.
        behavior_logp: float32 [N], the realised token's logprob when it was sampled, fixed.
        importance: How ratios are bounded.
        lengths: Tokens of each sequence.
        num_tokens: Divisor of a sum over tokens: the number of trained tokens in the whole step.
        vocab_size: V of the student.
        taid_t: TAID's interpolation weight at this step; 1 for any other objective.
    """

    logp_at_ids: Tensor
    logp_new: Tensor
    teacher: SparseTeacher
    behavior_logp: Tensor
    importance: ImportanceSampling
    lengths: tuple[int, ...]
    num_tokens: int
    vocab_size: int
    taid_t: float = 1.0


@dataclass(frozen=True, slots=True)
class LossOutput:
    """An objective's loss on a micro-batch, and its values for the run log.

    Attributes:
        loss: Sum over the tokens, divided by the step's token count; differentiable.
        advantage: Each sampled token's advantage as the loss used it, float64 [N]; None for a loss without one.
        counts: For the run log, added up over the step.
        means: For the run log, averaged over the step's tokens.
    """

    loss: Tensor
    advantage: Float64 | None = None
    counts: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)


TokenLoss: TypeAlias = Callable[[TokenView], Tensor]
"""A custom objective: returns the loss of each token, [N], to be summed and divided by ``num_tokens``."""


def select_teacher_rows(batch: MicroBatch[PreparedSample], vocab_size: int, *, lists: bool) -> TopK:
    """Select the teacher's rows of a batch's tokens; move ids outside the student's vocabulary to the tail.

    Without ``lists`` the rows have K = 0, and only their realised tokens.
    """
    parts = []
    for sample, pick in zip(batch.samples, batch.picks, strict=True):
        if lists:
            parts.append(require_list(sample).take(pick))
        else:
            actual_ids, actual_logp = sample.core.completion_ids[pick], sample.teacher_logp[pick]
            parts.append(TopK.from_lists([None] * len(pick), actual_ids=actual_ids, actual_logp=actual_logp))
    return TopK.concat(parts).within(vocab_size)


def require_list(sample: PreparedSample) -> TopK:
    """Return the sample's top-K rows; refuse a sample with realised-token logprobs only."""
    if not isinstance(sample, TopKPreparedSample):
        raise ConfigError(
            "this objective needs the teacher's top-K rows",
            got="a sample with realised-token logprobs only",
            hint="score with k >= 1, or use objective scalar_kl or gjs without a baseline and at gamma 0",
        )
    return sample.teacher


def select_behavior_logp(batch: MicroBatch[PreparedSample]) -> Float32:
    """Select the logprobs stored in the rollouts for a batch's tokens, float32 [N]; NaN = unknown."""
    pairs = zip(batch.samples, batch.picks, strict=True)
    return np.concatenate([sample.behavior.logp[pick] for sample, pick in pairs])
