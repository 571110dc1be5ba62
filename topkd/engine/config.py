"""What the engine can be told, checked where it enters."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScalarKL(_Frozen):
    """Sampled-token reverse KL: A = log t(y) - log s(y)."""

    kind: Literal["scalar_kl"] = "scalar_kl"


class GJS(_Frozen):
    """Sampled-token generalised Jensen-Shannon: A = (1-beta) log(beta t(y)/s(y) + 1 - beta), beta on the teacher."""

    kind: Literal["gjs"] = "gjs"
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class TopKPolicyGradient(_Frozen):
    """The sum over the teacher's top-K plus a sampled tail, docs/math.md: unbiased at lam = 1, less noisy below."""

    kind: Literal["topk_pg"] = "topk_pg"
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3


Objective: TypeAlias = Annotated[ScalarKL | GJS | TopKPolicyGradient, Field(discriminator="kind")]


class ImportanceSampling(_Frozen):
    """Weight of each sampled token: new over behaviour probability, truncated at ``cap`` (detached), or none."""

    kind: Literal["none", "truncated"] = "truncated"
    cap: PositiveFloat = 2.0


_Decay: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]


class LearnerConfig(_Frozen):
    """How a step is taken."""

    lr: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 16384
    importance: ImportanceSampling = ImportanceSampling()


class RolloutConfig(_Frozen):
    """How completions are drawn. Every parameter is explicit: a model's generation_config never leaks in."""

    prompts_per_step: PositiveInt = 64
    samples_per_prompt: PositiveInt = 4
    max_prompt_tokens: PositiveInt = 2048
    max_completion_tokens: PositiveInt = 1024
    overlong: Literal["drop", "error"] = "error"
    batch_size: PositiveInt = 64


class EngineConfig(_Frozen):
    """The loop: how long, how stale, towards what."""

    steps: PositiveInt = 100
    seed: Annotated[int, Field(ge=0)] = 0
    k: PositiveInt = 20
    max_staleness: Annotated[int, Field(ge=0)] = 1
    max_lost_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    eval_every: Annotated[int, Field(ge=0)] = 0
    objective: Objective = TopKPolicyGradient()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
