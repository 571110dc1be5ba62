"""How a step is taken, as a config says it."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

from topkd.engine.frozen import Frozen


class ImportanceSampling(Frozen):
    """Weight of each sampled token: new over behaviour probability, truncated at ``cap`` (detached), or none."""

    kind: Literal["none", "truncated"] = "truncated"
    cap: PositiveFloat = 2.0


_Decay: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]


class LearnerConfig(Frozen):
    """How a step is taken."""

    lr: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 16384
    importance: ImportanceSampling = ImportanceSampling()
