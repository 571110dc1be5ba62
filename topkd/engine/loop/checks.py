"""Checks before a run's first request, and of the samples that a step has lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.loop.candidates import check_support
from topkd.engine.loop.data_mixing import check_mixture
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.scoring import ScoredBatch, find_teacher
from topkd.topk.errors import CacheMissError, ConfigError, TrainingError
from topkd.topk.protocols import TeacherScorer


def check_run(config: EngineConfig, rows: Sequence[PromptRow], teachers: Mapping[str, TeacherScorer]) -> None:
    """Check that there are prompts that fit, and teachers that can do what the objective asks."""
    if not rows:
        raise ConfigError("no prompts to train on", hint="check the data file and the length limits")
    check_mixture(config, rows)
    if not config.objective.is_data_only:
        for teacher_id in {row.teacher_id for row in rows}:
            find_teacher(teachers, teacher_id)
    check_support(config.objective.list_support, teachers)
    longest = max(rows, key=lambda row: row.prompt_ids.size)
    if longest.prompt_ids.size > config.rollout.max_prompt_tokens:
        raise ConfigError(
            "a prompt is longer than rollout.max_prompt_tokens",
            where=f"row {longest.sample_id or '?'}",
            got=longest.prompt_ids.size,
            expected=f"at most {config.rollout.max_prompt_tokens}",
            hint='raise the limit or set overlong = "drop"; prompts are never cut silently',
        )


def refuse_losses(config: EngineConfig, batch: ScoredBatch, step: int) -> None:
    """Raises when more samples than ``max_lost_fraction`` of a step have no scores: the cause, or the account."""
    lost = batch.lost.total()
    if lost <= config.max_lost_fraction * batch.total:
        return
    if batch.first_error is not None and (lost == batch.total or isinstance(batch.first_error, CacheMissError)):
        raise batch.first_error
    raise TrainingError(
        f"step {step + 1} lost {lost} of {batch.total} samples",
        got=f"{dict(batch.lost)}; first: {batch.first_error}",
        expected=f"at most the fraction max_lost_fraction = {config.max_lost_fraction}",
    ) from batch.first_error
