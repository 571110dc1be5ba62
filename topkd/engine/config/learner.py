"""Settings of the learner, of importance sampling and of LoRA."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

FULL_LR, LORA_LR = 2e-6, 1e-4


class Frozen(BaseModel):
    """Immutable settings that refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ImportanceSampling(Frozen):
    """Weight of each sampled token: its probability now over its probability when sampled, or none.

    ``truncated`` limits it to ``cap`` (detached). ``ppo`` is for sampled-token objectives only: it clips the weight to
    1 +- ``clip`` inside the graph, and for negative advantages limits it to ``dual_clip``.
    """

    kind: Literal["none", "truncated", "ppo"] = "truncated"
    cap: PositiveFloat = 2.0
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] | None = 3.0


_Decay: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]


class LearnerConfig(Frozen):
    """Settings of an optimiser step. The default of ``lr`` is 2e-6, or 1e-4 when only a LoRA adapter trains.

    Each batch gets ``inner_steps`` optimiser steps; in all of them ratios use the logprobs stored in the rollouts.
    After ``warmup_steps`` the rate stays constant or falls to ``final_lr_fraction`` of its peak by the last step.
    ``autocast`` sets the dtype of the forward pass, not of the trained weights; ``auto`` is bfloat16 on a GPU that
    supports it. The output head runs in float32 unless ``autocast_head`` is set: bfloat16 logits change a log-ratio by
    several percent. ``strategy`` says how several processes under torchrun hold the weights: whole on each, or sharded
    over all.
    """

    lr: Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    max_grad_norm: PositiveFloat = 1.0
    inner_steps: PositiveInt = 1
    micro_batch_tokens: PositiveInt = 16384
    gradient_checkpointing: bool = False
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    autocast_head: bool = False
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    importance: ImportanceSampling = ImportanceSampling()

    def learning_rate(self, *, lora: bool) -> float:
        """Return the peak learning rate: ``lr``, or the default for a full model or an adapter."""
        return self.lr if self.lr is not None else LORA_LR if lora else FULL_LR


class LoRAConfig(Frozen):
    """``[student.lora]``: train a low-rank adapter, and freeze the model's own weights.

    There is no dropout: with it the trained policy would not be the policy that was sampled. Modules in
    ``modules_to_save`` are trained in full (``["lm_head"]`` after the vocabulary was extended).
    """

    r: PositiveInt = 32
    alpha: PositiveFloat = 64.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    dropout: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0
