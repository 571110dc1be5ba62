"""Bind an objective's settings to its loss, mask the tokens it cannot use, and compute it on a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from topkd.engine.config.learner import ImportanceSampling
from topkd.engine.config.objectives import (
    CustomObjective,
    Objective,
    ObjectiveSettings,
    TopKPolicyGradient,
    check_loss_function,
    name_function,
)
from topkd.engine.learner.batching import MicroBatch
from topkd.engine.learner.losses import LOSSES, find_finite_suffix
from topkd.engine.learner.token_view import (
    LossOutput,
    TokenLoss,
    TokenView,
    require_list,
    select_behavior_logp,
    select_teacher_rows,
)
from topkd.topk.errors import ConfigError
from topkd.topk.losses import SparseTeacher
from topkd.topk.samples import PreparedSample, TextSample
from topkd.topk.types import Bool, Float32, Float64

Score: TypeAlias = Callable[[MicroBatch[PreparedSample] | MicroBatch[TextSample], Tensor], Tensor]
"""(batch, ids int64 [N, M]) -> exact student logprobs [N, M], differentiable, at the batch's rows."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of each token of one micro-batch, [N], and the objective's own counts; for the run log.

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


@dataclass(frozen=True, slots=True)
class BoundObjective:
    """An objective's settings, and the function that computes its loss."""

    settings: Objective
    compute: Callable[[TokenView], LossOutput]


def bind_objective(objective: Objective | TokenLoss, function: TokenLoss | None = None) -> BoundObjective:
    """Find the loss of an objective.

    Args:
        objective: Settings, or a function of your own.
        function: The function that a custom objective's settings name, already loaded.

    Raises:
        ConfigError: The settings name a function that was not passed, or it does not take one ``TokenView``.
    """
    if not isinstance(objective, ObjectiveSettings):
        return bind_objective(CustomObjective.of_function(objective, TopKPolicyGradient()), objective)
    if isinstance(objective, CustomObjective):
        if function is None:
            raise ConfigError(
                "the function of a custom objective is missing", where=objective.name, hint="pass it as loss="
            )
        check_loss_function(function, where=objective.name)
        return BoundObjective(objective, partial(_compute_custom, function))
    if objective.is_data_only:
        return BoundObjective(objective, _refuse_scored_samples)
    return BoundObjective(objective, partial(LOSSES[objective.kind], objective))


def _compute_custom(function: TokenLoss, view: TokenView) -> LossOutput:
    per_token: object = function(view)
    if not isinstance(per_token, Tensor) or per_token.shape != view.logp_new.shape:
        raise ConfigError(
            "a custom objective must return one loss per token",
            where=name_function(function),
            got=tuple(per_token.shape) if isinstance(per_token, Tensor) else type(per_token).__name__,
            expected=tuple(view.logp_new.shape),
        )
    return LossOutput(per_token.sum() / view.num_tokens)


def _refuse_scored_samples(_: TokenView) -> LossOutput:
    raise ConfigError("objective sft learns from the data's completions, not from scored samples")


def describe_objective(objective: Objective) -> dict[str, object]:
    """Describe an objective for the run log: its name and settings."""
    return {"divergence_mode": objective.name, "objective": objective.model_dump()}


def find_valid_tokens(sample: PreparedSample, objective: Objective, vocab_size: int) -> Bool:
    """Find the completion tokens that train, bool [C]; tokens with an unknown logprob are masked.

    Where the advantage is a log-ratio (scalar KL, beta = 1), a token to which the teacher gives probability zero has no
    finite advantage and is masked too. The top-K objective leaves out only such a token's tail term. An objective that
    reads the list masks a row that lists none of the student's ``vocab_size`` ids. At gamma > 0 a token trains only if
    all returns after it are known.
    """
    if objective.is_data_only:
        raise ConfigError("objective sft learns from the data's completions, not from scored samples")
    valid: Bool = sample.core.mask.copy()
    if objective.needs_list:
        valid &= require_list(sample).within(vocab_size).signal
    if objective.needs_behavior:
        valid &= ~np.isnan(sample.teacher_logp) & ~np.isnan(sample.behavior.logp)
    if objective.needs_finite_teacher:
        valid &= np.isfinite(sample.teacher_logp)
    if objective.sums_returns:
        known = find_finite_suffix(valid | ~sample.core.mask)  # tokens that do not train do not count
        valid &= known
    return valid


def compute_objective_loss(
    objective: BoundObjective,
    *,
    score: Score,
    batch: MicroBatch[PreparedSample],
    importance: ImportanceSampling,
    num_tokens: int,
    vocab_size: int,
    taid_t: float = 1.0,
    stop_ids: tuple[int, ...] = (),
) -> tuple[Tensor, TokenStats]:
    """Compute one micro-batch's loss, divided by the whole step's ``num_tokens``, and its tokens' statistics.

    Args:
        objective: What to minimise.
        score: The student's logprobs at chosen ids, in vocabulary chunks: no N x V exists.
        batch: The samples, padded, and their positions that train.
        importance: How sampled tokens are weighted; ratios use the logprobs stored in the rollouts.
        num_tokens: Trained tokens of the global batch.
        vocab_size: V of the student.
        taid_t: TAID's interpolation weight.
        stop_ids: Ids that end a completion; the run log shows their probability.
    """
    rows = select_teacher_rows(batch, vocab_size, lists=objective.settings.needs_list)
    ids = torch.from_numpy(rows.ids.astype(np.int64)).to(batch.targets.device)
    stops = torch.tensor(stop_ids, dtype=torch.long, device=ids.device).expand(batch.tokens, -1)
    logp = score(batch, torch.cat([ids, batch.targets[:, None], stops], dim=1))
    behavior = select_behavior_logp(batch)
    view = TokenView(
        logp_at_ids=logp[:, : rows.k],
        logp_new=logp[:, rows.k],
        teacher=SparseTeacher.from_topk(rows, logp.device, torch.float32),
        behavior_logp=torch.from_numpy(behavior).to(logp.device),
        importance=importance,
        lengths=tuple(len(pick) for pick in batch.picks),
        num_tokens=num_tokens,
        vocab_size=vocab_size,
        taid_t=taid_t,
    )
    output = objective.compute(view)
    stats = TokenStats(
        view.logp_new.detach().cpu().numpy(),
        behavior,
        rows.actual_logp,
        output.advantage,
        output.counts,
        output.means,
        stop_p=logp[:, rows.k + 1 :].detach().exp().sum(1).cpu().double().numpy() if stop_ids else None,
    )
    if logp.requires_grad:

        def keep(gradient: Tensor) -> None:
            weight = gradient.detach().abs().nan_to_num(posinf=0.0).sum(1).cpu().double() * num_tokens
            stats.coefficient.append(weight.numpy())

        logp.register_hook(keep)  # type: ignore[no-untyped-call]
    return output.loss, stats


def compute_text_loss(score: Score, batch: MicroBatch[TextSample], num_tokens: int) -> Tensor:
    """Compute the cross-entropy of the data's own tokens, -(1/N) sum log s(y), in nats."""
    return -score(batch, batch.targets[:, None]).sum() / num_tokens
