"""Completions from the data, in addition to the student's: how many, which, and with which loss they train.

The student completes round(on_policy_fraction * prompts_per_step) prompts of a step. The other rows have a completion,
which is used once; they come from a pool of their own, chosen by seed and step alone. With ``data_loss = "sft"`` they
train by cross-entropy and no teacher sees them. With ``"objective"`` the teacher scores them and they train like the
student's own completions (GKD's mixture, arXiv:2306.13649); only for direct objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.loop.prompts import PromptRow, step_indices
from topkd.topk.errors import ConfigError
from topkd.topk.samples import Rollout, SampleCore, SamplingParams, TextSample
from topkd.topk.types import Bool

DATA = "data"  # the version of a completion that no policy of this run sampled
_POOL = 0x5F7  # gives the data rows another order than the prompts


def count_on_policy_prompts(config: EngineConfig) -> int:
    """Count the prompts of a step that the student completes."""
    share = 0.0 if config.objective.is_data_only else config.on_policy_fraction
    return round(share * config.rollout.prompts_per_step)


def check_mixture(config: EngineConfig, rows: Sequence[PromptRow]) -> None:
    """Refuse a run whose data lacks the completions that it needs, or whose steps are too small for the mixture."""
    prompts = config.rollout.prompts_per_step
    if 0.0 < config.on_policy_fraction < 1.0 and count_on_policy_prompts(config) in {0, prompts}:
        raise ConfigError(
            "a step is too small for on_policy_fraction",
            got=f"{config.on_policy_fraction:g} of {prompts} prompts, which is {count_on_policy_prompts(config)}",
            hint="raise rollout.prompts_per_step, or set on_policy_fraction to 0 or 1",
        )
    if count_on_policy_prompts(config) < config.rollout.prompts_per_step and not _pool(rows):
        what = f"objective {config.objective.name}" if config.objective.is_data_only else "on_policy_fraction below 1"
        raise ConfigError(
            f"{what} needs completions in the data, and no row has one",
            hint="give the rows completion, completion_ids or assistant turns",
        )


def select_data_rows(config: EngineConfig, rows: Sequence[PromptRow], step: int) -> list[PromptRow]:
    """Select the rows whose completions from the data step ``step`` learns from."""
    count = config.rollout.prompts_per_step - count_on_policy_prompts(config)
    if not count:
        return []
    pool = _pool(rows)
    return [pool[i] for i in step_indices(len(pool), count, step, config.seed + _POOL)]


def build_data_rollouts(
    config: EngineConfig, rows: Sequence[PromptRow], step: int
) -> tuple[list[PromptRow], list[Rollout]]:
    """Build the data rows' rollouts for the teacher to score; none where they train by cross-entropy."""
    if config.data_loss == "sft" or config.objective.is_data_only:
        return [], []
    chosen = select_data_rows(config, rows, step)
    return chosen, [_rollout(row) for row in chosen]


def build_data_texts(config: EngineConfig, rows: Sequence[PromptRow], step: int) -> list[TextSample]:
    """Build the data rows' texts for cross-entropy; none where the teacher scores them."""
    if config.data_loss == "objective" and not config.objective.is_data_only:
        return []
    return [TextSample(build_core(row, _rollout(row))) for row in select_data_rows(config, rows, step)]


def build_trained_mask(row: PromptRow, rollout: Rollout) -> Bool:
    """Mark a rollout's tokens that train: all that the student sampled, or those in a data completion's mask."""
    if rollout.version == DATA and row.completion_mask is not None:
        return row.completion_mask
    return np.ones(rollout.completion_ids.size, dtype=np.bool_)


def build_core(row: PromptRow, rollout: Rollout, *, trains: bool = True) -> SampleCore:
    """Build the teacher-independent part of a sample; ``trains=False`` masks every token."""
    return SampleCore(
        np.concatenate([rollout.prompt_ids, rollout.completion_ids]),
        int(rollout.prompt_ids.size),
        build_trained_mask(row, rollout) & trains,
        row.teacher_prompt_ids,
        row.teacher_id,
        row.sample_id,
    )


def _pool(rows: Sequence[PromptRow]) -> list[PromptRow]:
    return [row for row in rows if row.completion_ids is not None]


def _rollout(row: PromptRow) -> Rollout:
    completion = row.completion_ids
    if completion is None:
        raise ConfigError("a data row has no completion", where=row.sample_id)
    unknown = np.full(completion.size, np.nan, dtype=np.float32)  # no policy sampled it: its probabilities are unknown
    return Rollout(row.prompt_ids, completion, unknown, "stop", SamplingParams(), None, DATA)
