"""Settings of a run's loop, rollouts and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from topkd.engine.config.learner import Frozen, LearnerConfig
from topkd.engine.config.objectives import Objective, TopKPolicyGradient, expand_kind

COMPLETIONS = 1_000_000  # at most, in a step: all of them are in memory at once
DEFAULT_KIND = TopKPolicyGradient().kind


class RolloutConfig(Frozen):
    """Settings of sampling. Every parameter is sent explicitly: a model's generation_config is never used."""

    prompts_per_step: PositiveInt = 64
    samples_per_prompt: PositiveInt = 4
    max_prompt_tokens: PositiveInt = 2048
    max_completion_tokens: PositiveInt = 1024
    overlong: Literal["drop", "error"] = "error"
    truncated: Literal["keep", "mask"] = "keep"
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()  # in addition to the tokenizer's end of text
    batch_size: PositiveInt = 64
    shards: Annotated[int, Field(ge=0)] = 0  # parts of a step, each with its own seed; 0: one per process

    @model_validator(mode="after")
    def _fits_a_machine(self) -> RolloutConfig:
        if (completions := self.prompts_per_step * self.samples_per_prompt) > COMPLETIONS:
            raise ValueError(f"at most {COMPLETIONS:,} completions per step (prompts x samples), not {completions:,}")
        return self


class CheckpointConfig(Frozen):
    """How often a run writes a checkpoint, from which it can be resumed exactly, and how many it keeps.

    A checkpoint is also written after the last step, and when the run is stopped or fails. ``every = 0``: never.
    """

    every: Annotated[int, Field(ge=0)] = 25
    keep: PositiveInt = 2


class EngineConfig(Frozen):
    """Settings of the training loop: steps, staleness, objective, rollouts, checkpoints."""

    steps: Annotated[PositiveInt, Field(le=10**9)] = 100
    seed: Annotated[int, Field(ge=0)] = 0
    k: PositiveInt = 20
    max_staleness: Annotated[int, Field(ge=0)] = 1
    max_lost_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    eval_every: Annotated[int, Field(ge=0)] = 0
    objective: Objective = TopKPolicyGradient()
    on_policy_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0  # share of prompts that the student completes
    data_loss: Literal["sft", "objective"] = "sft"  # the loss for completions from the data
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("objective", mode="before")
    @classmethod
    def _find_kind(cls, value: object) -> object:
        """Set the kind: the default where it is missing, ``custom`` where it names a function."""
        return expand_kind(value, DEFAULT_KIND) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _makes_sense_together(self) -> EngineConfig:
        why = self.objective.find_conflict(
            self.learner.importance.kind,
            on_policy_fraction=self.on_policy_fraction,
            data_loss=self.data_loss,
        )
        if why is not None:
            raise ValueError(why)
        return self
