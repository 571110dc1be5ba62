"""From teacher and student logprobs to a loss: one objective a branch, the same run log for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

import numpy as np
import torch
from torch import Tensor

from topkd.engine.config.learner import Frozen, ImportanceSampling
from topkd.engine.config.objectives import (
    EOPD,
    GJS,
    KD,
    SFT,
    TAID,
    DirectGJS,
    EntropyAware,
    ForwardKL,
    Objective,
    ReverseKL,
    ScalarKL,
    TopKPolicyGradient,
)
from topkd.engine.learner.batching import MicroBatch, TextSample
from topkd.engine.learner.direct_losses import direct_loss, eopd_loss_of
from topkd.engine.learner.policy_gradients import find_finite_suffix, sampled_loss, topk_loss
from topkd.engine.learner.token_view import (
    TokenLoss,
    TokenView,
    build_view,
    require_list,
    select_behavior_logp,
    select_teacher_rows,
)
from topkd.topk.errors import ConfigError
from topkd.topk.samples import PreparedSample
from topkd.topk.types import Bool, Float32, Float64

Score: TypeAlias = Callable[[MicroBatch[PreparedSample] | MicroBatch[TextSample], Tensor], Tensor]
"""(batch, ids int64 [N, M]) -> exact student logprobs [N, M] with graph, at the batch's rows."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per-token facts of one micro-batch, [N], and what its objective counted; for the run log.

    ``coefficient`` is filled by the backward pass: N x sum_k |dL / d log s_k| of each token, over every logprob that
    its loss reads.
    """

    logp_new: Float32
    logp_behavior: Float32
    logp_teacher: Float32
    advantage: Float64 | None
    counts: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    coefficient: list[Float64] = field(default_factory=list)
    stop_p: Float64 | None = None


def needs_teacher_list(objective: Objective | TokenLoss) -> bool:
    """Whether the teacher's list is looked at, beside the realised token."""
    match objective:
        case ScalarKL() | GJS():
            return objective.baseline == "value" or objective.gamma > 0.0
        case SFT():
            return False
        case _:
            return True


def describe_objective(objective: Objective | TokenLoss) -> dict[str, object]:
    """What the run log calls it: its kind and settings, or the name of a function of one's own."""
    if isinstance(objective, Frozen):
        return {"divergence_mode": objective.kind, "objective": objective.model_dump()}
    name = getattr(objective, "__qualname__", type(objective).__name__)
    return {"divergence_mode": f"custom: {name}", "objective": {"kind": "custom", "function": name}}


def find_valid_tokens(sample: PreparedSample, objective: Objective | TokenLoss, vocab_size: int) -> Bool:
    """Bool [C]: completion tokens that train. Unknown teacher or behaviour logprobs are masked, never replaced.

    Where the advantage is a log-ratio (scalar KL, beta = 1), a token to which the teacher gives exactly zero
    probability has none that is finite: masked too. The top-K objective leaves out such a token's tail term alone,
    and needs a row that lists something among the student's ``vocab_size`` ids. At gamma > 0 a return is known only
    where everything that follows is.
    """
    valid: Bool = sample.core.mask.copy()
    if needs_teacher_list(objective):
        valid &= require_list(sample).within(vocab_size).signal
    if not isinstance(objective, ForwardKL | ReverseKL | DirectGJS | KD | TAID | EntropyAware):
        valid &= ~np.isnan(sample.teacher_logp) & ~np.isnan(sample.behavior.logp)
    match objective:
        case ScalarKL():
            valid &= np.isfinite(sample.teacher_logp)
        case GJS():
            valid &= np.isfinite(sample.teacher_logp) | (objective.beta < 1.0)
        case SFT():
            raise ConfigError("objective sft learns from the data's completions, not from scored samples")
        case _:  # a sum over the list needs no realised token: only the tail term is left out
            pass
    if isinstance(objective, ScalarKL | GJS | TopKPolicyGradient) and objective.gamma > 0.0:
        known = find_finite_suffix(valid | ~sample.core.mask)  # what the policy did not say counts for nothing
        valid &= known
    return valid


def compute_objective_loss(
    objective: Objective | TokenLoss,
    *,
    score: Score,
    batch: MicroBatch[PreparedSample],
    importance: ImportanceSampling,
    num_tokens: int,
    vocab_size: int,
    t: float = 1.0,
    stop_ids: tuple[int, ...] = (),
) -> tuple[Tensor, TokenStats]:
    """Loss of one micro-batch, divided by ``num_tokens`` of the whole step, and what its tokens looked like.

    Args:
        objective: What to minimise: a config, or a function of one's own.
        score: The student's logprobs at chosen ids, in vocabulary chunks: no N x V exists.
        batch: Tokens, samples and picks.
        importance: Weight of sampled tokens against the fixed rollout logprobs.
        num_tokens: Trained tokens of the global batch.
        vocab_size: V of the student.
        t: TAID's interpolation weight.
        stop_ids: Whose probability the run log shows.
    """
    rows = select_teacher_rows(batch, vocab_size, lists=needs_teacher_list(objective))
    ids = torch.from_numpy(rows.ids.astype(np.int64)).to(batch.targets.device)
    stops = torch.tensor(stop_ids, dtype=torch.long, device=ids.device).expand(batch.tokens, -1)
    logp = score(batch, torch.cat([ids, batch.targets[:, None], stops], dim=1))
    view = build_view(batch, logp, rows, importance=importance, num_tokens=num_tokens, vocab_size=vocab_size)
    loss, advantage, counts, means = _dispatch(objective, view, t)
    stats = TokenStats(
        view.logp_new.detach().cpu().numpy(),
        select_behavior_logp(batch),
        rows.actual_logp,
        advantage,
        counts,
        means,
        stop_p=logp[:, rows.k + 1 :].detach().exp().sum(1).cpu().double().numpy() if stop_ids else None,
    )
    if logp.requires_grad:

        def keep(gradient: Tensor) -> None:
            weight = gradient.detach().abs().nan_to_num(posinf=0.0).sum(1).cpu().double() * num_tokens
            stats.coefficient.append(weight.numpy())

        logp.register_hook(keep)  # type: ignore[no-untyped-call]
    return loss, stats


def _dispatch(
    objective: Objective | TokenLoss, view: TokenView, t: float
) -> tuple[Tensor, Float64 | None, dict[str, float], dict[str, float]]:
    match objective:
        case ScalarKL() | GJS():
            loss, advantage = sampled_loss(objective, view)
            return loss, advantage, {}, {}
        case TopKPolicyGradient():
            loss, advantage, counted = topk_loss(objective, view)
            counts = {"gated_rows": counted["gated_rows"]}
            return loss, advantage, counts, {"divergence_bucket": counted["divergence_bucket"]}
        case EOPD():
            loss, on_device, means = eopd_loss_of(objective, view)
            return loss, on_device.cpu().double().numpy(), {}, means
        case ForwardKL() | ReverseKL() | DirectGJS() | KD() | TAID() | EntropyAware():
            loss, means = direct_loss(objective, view, t=t)
            return loss, None, {}, means
        case SFT():
            raise ConfigError("objective sft learns from the data's completions, not from scored samples")
        case _ if callable(objective):
            return _compute_custom_loss(objective, view), None, {}, {}
        case _:
            assert_never(objective)


def _compute_custom_loss(objective: TokenLoss, view: TokenView) -> Tensor:
    per_token: object = objective(view)
    if not isinstance(per_token, Tensor) or per_token.shape != view.logp_new.shape:
        raise ConfigError(
            "an objective of one's own gives one loss a token",
            got=tuple(per_token.shape) if isinstance(per_token, Tensor) else type(per_token).__name__,
            expected=tuple(view.logp_new.shape),
        )
    return per_token.sum() / view.num_tokens


def compute_text_loss(score: Score, batch: MicroBatch[TextSample], num_tokens: int) -> Tensor:
    """Cross-entropy of the data's own tokens, -(1/N) sum log s(y), in nats."""
    return -score(batch, batch.targets[:, None]).sum() / num_tokens
