"""From teacher and student logprobs to a loss: one objective a branch, the same diary for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from topkd.engine.batching import MicroBatch
from topkd.engine.learner_config import ImportanceSampling
from topkd.engine.objective_config import GJS, Objective, ScalarKL, TopKPolicyGradient
from topkd.engine.student import Student
from topkd.topk import TopK, TopKPreparedSample, gjs_advantage, scalar_kl_advantage
from topkd.topk.errors import ConfigError
from topkd.topk.fused import topk_logprobs
from topkd.topk.losses import importance_sampling_loss, topk_policy_gradient_loss
from topkd.topk.samples import PreparedSample
from topkd.topk.types import Bool, Float32, Float64


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per-token facts of one micro-batch, float [N], and what the top-K estimator counted; for the diary."""

    logp_new: Float32
    logp_behavior: Float32
    logp_teacher: Float32
    advantage: Float64
    estimator: dict[str, float] = field(default_factory=dict)


def valid_tokens(sample: PreparedSample, objective: Objective, vocab_size: int) -> Bool:
    """Bool [C]: completion tokens that train. Unknown teacher or behaviour logprobs are masked, never replaced.

    Where the advantage is a log-ratio (scalar KL, beta = 1), a token to which the teacher gives exactly zero
    probability has none that is finite: masked too. The top-K objective leaves out such a token's tail term alone,
    and needs a row that lists something among the student's ``vocab_size`` ids.
    """
    valid = sample.core.mask & ~np.isnan(sample.teacher_logp) & ~np.isnan(sample.behavior.logp)
    match objective:
        case ScalarKL():
            valid &= np.isfinite(sample.teacher_logp)
        case GJS():
            valid &= np.isfinite(sample.teacher_logp) | (objective.beta < 1.0)
        case TopKPolicyGradient():  # its sum over the list needs no realised token: only the tail term is left out
            valid &= _teacher_rows(sample).within(vocab_size).signal
        case _:
            assert_never(objective)
    return valid


def objective_loss(
    objective: Objective,
    *,
    student: Student,
    hidden: Tensor,
    batch: MicroBatch,
    importance: ImportanceSampling,
    num_tokens: int,
) -> tuple[Tensor, TokenStats]:
    """Loss of one micro-batch, divided by ``num_tokens`` of the whole step, and what its tokens looked like.

    Args:
        objective: What to minimise.
        student: Whose head turns ``hidden`` into logprobs, in vocabulary chunks: no N x V exists.
        hidden: [N, H] at the batch's trained rows, with graph.
        batch: Tokens, samples and picks behind those rows.
        importance: Weight of sampled tokens against the fixed rollout logprobs.
        num_tokens: Trained tokens of the global batch.
    """
    rows = _rows(batch, student.vocab_size) if isinstance(objective, TopKPolicyGradient) else _unlisted(batch.tokens)
    listed = torch.from_numpy(rows.ids.astype(np.int64)).to(hidden.device)
    weight, bias = student.head_parameters()
    logp_all, _ = topk_logprobs(hidden, weight, torch.cat([listed, batch.targets[:, None]], dim=1), bias=bias)
    logp_new = logp_all[:, -1]
    behavior = _cut(batch, [sample.behavior.logp for sample in batch.samples])
    teacher = _cut(batch, [sample.teacher_logp for sample in batch.samples])
    current = logp_new.detach().cpu().numpy()
    on_device = torch.from_numpy(behavior).to(hidden.device)
    cap = importance.cap if importance.kind == "truncated" else 1.0
    reference = on_device if importance.kind == "truncated" else logp_new.detach()
    estimator: dict[str, float] = {}
    match objective:
        case ScalarKL() | GJS():
            beta = objective.beta if isinstance(objective, GJS) else None
            advantage = scalar_kl_advantage(teacher, current) if beta is None else gjs_advantage(teacher, current, beta)
            loss = importance_sampling_loss(
                logp_new, reference, torch.from_numpy(advantage).to(hidden.device), cap=cap, num_tokens=num_tokens
            )
        case TopKPolicyGradient():
            loss, estimator = topk_policy_gradient_loss(
                logp_all[:, :-1],
                logp_new,
                rows,
                beta=objective.beta,
                lam=objective.lam,
                behavior_logp=reference,
                cap=cap,
                num_tokens=num_tokens,
                return_metrics=True,
            )
            advantage = gjs_advantage(teacher, current, objective.beta)
        case _:
            assert_never(objective)
    return loss, TokenStats(current, behavior, teacher, np.asarray(advantage, dtype=np.float64), estimator)


def _unlisted(tokens: int) -> TopK:
    """Rows with no list: what a sampled-token objective needs of the teacher beside its realised logprobs."""
    return TopK.from_lists([None] * tokens)


def _rows(batch: MicroBatch, vocab_size: int) -> TopK:
    parts = []
    for sample, pick in zip(batch.samples, batch.picks, strict=True):
        rows = _teacher_rows(sample)
        parts.append(
            TopK(
                0, rows.ids[pick], rows.logp[pick], rows.actual_ids[pick], rows.actual_logp[pick], rows.tail_logp[pick]
            )
        )
    return TopK.concat(parts).within(vocab_size)


def _teacher_rows(sample: PreparedSample) -> TopK:
    if not isinstance(sample, TopKPreparedSample):
        raise ConfigError(
            "the topk_pg objective needs the teacher's top-K rows",
            got="a sample with realised-token logprobs only",
            hint="score with k >= 1, or use objective scalar_kl or gjs",
        )
    return sample.teacher


def _cut(batch: MicroBatch, values: list[Float32]) -> Float32:
    return np.concatenate([value[pick] for value, pick in zip(values, batch.picks, strict=True)])
