"""LoRA as a config says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from topkd.engine.frozen import Frozen


class LoRAConfig(Frozen):
    """``[student.lora]``: train a low-rank adapter, and leave the model's own weights alone.

    There is no dropout: with it the policy that is trained is not the policy that was sampled. ``modules_to_save`` are
    trained whole (``["lm_head"]`` where the vocabulary grew).
    """

    r: PositiveInt = 32
    alpha: PositiveFloat = 64.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    dropout: Annotated[float, Field(ge=0.0, le=0.0)] = 0.0
