"""Objectives as a config says them: a union discriminated by ``kind``, and what does not go together, and why."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

from topkd.engine.config.learner import Frozen

Beta: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
Gamma: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
Tail: TypeAlias = Literal["bucket", "renormalise"]


class _Sampled(Frozen):
    """A policy gradient on the sampled token.

    ``baseline = "value"`` subtracts the mean advantage of the position, from the teacher's list (variance only).
    ``gamma`` > 0 adds the discounted divergences of the positions that follow. ``advantage_clip`` bounds |A| of each
    token, after the baseline. ``advantage = "state"`` leaves out the token's own part: what follows, and nothing else.
    """

    needs_list: ClassVar[bool] = False
    needs_behavior: ClassVar[bool] = True
    baseline: Literal["none", "value"] = "none"
    gamma: Gamma = 0.0
    advantage_clip: PositiveFloat | None = None
    advantage: Literal["token", "state"] = "token"


class ScalarKL(_Sampled):
    """Sampled-token reverse KL: A = log t(y) - log s(y)."""

    kind: Literal["scalar_kl"] = "scalar_kl"


class GJS(_Sampled):
    """Sampled-token generalised Jensen-Shannon: A = (1-beta) log(beta t(y)/s(y) + 1 - beta), beta on the teacher."""

    kind: Literal["gjs"] = "gjs"
    beta: Beta = 0.5


class TopKPolicyGradient(Frozen):
    """The sum over the teacher's top-K plus a sampled tail, docs/math.md: unbiased at lam = 1, less noisy below.

    ``support`` is the list the sum goes over; the student's needs a teacher that scores chosen ids.
    """

    needs_list: ClassVar[bool] = True
    needs_behavior: ClassVar[bool] = True
    kind: Literal["topk_pg"] = "topk_pg"
    beta: Beta = 0.5
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    gamma: Gamma = 0.0
    support: Literal["teacher", "student", "union"] = "teacher"


class _Direct(Frozen):
    """A loss on the teacher's whole list, differentiated through the student: no sampled token, no ratio."""

    needs_list: ClassVar[bool] = True
    needs_behavior: ClassVar[bool] = False


class ForwardKL(_Direct):
    """KL(T||S) on the list's bins: what is outside it is one bin, or (``renormalise``) is not looked at."""

    kind: Literal["fkl"] = "fkl"
    tail: Tail = "bucket"


class ReverseKL(_Direct):
    """KL(S||T) on the list's bins."""

    kind: Literal["rkl"] = "rkl"
    tail: Tail = "bucket"


class DirectGJS(_Direct):
    """Generalised Jensen-Shannon on the list's bins (GKD), differentiated directly."""

    kind: Literal["gjs_direct"] = "gjs_direct"
    beta: Beta = 0.5
    tail: Tail = "bucket"


class KD(_Direct):
    """Cross-entropy against the teacher's bins, KL(T||S) + H(T): the classical loss on a sparse teacher."""

    kind: Literal["kd"] = "kd"
    tail: Tail = "bucket"


class TAID(_Direct):
    """A target that moves from the student to the teacher, t from ``t_start`` to ``t_end`` over the run's steps.

    ``alpha`` and ``momentum`` drive how far t runs ahead of the straight line while the loss falls;
    ``adaptive = false`` keeps to the line.
    """

    kind: Literal["taid"] = "taid"
    tail: Tail = "bucket"
    t_start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.4
    t_end: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    alpha: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 5e-4
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    adaptive: bool = True


class EntropyAware(_Direct):
    """w KL(T||S) + (1-w) KL(S||T), w = clamp(H_T / h_max, 0, 1), by the lower entropy bound of the list."""

    kind: Literal["entropy_aware"] = "entropy_aware"
    h_max: PositiveFloat | None = None


class EOPD(Frozen):
    """Sampled-token reverse KL, plus alpha KL(T~_k||S) where the teacher's entropy is certainly tau nats or more."""

    needs_list: ClassVar[bool] = True
    needs_behavior: ClassVar[bool] = True
    kind: Literal["eopd"] = "eopd"
    tau: Annotated[float, Field(allow_inf_nan=False)] = 0.8
    alpha: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    top: PositiveInt = 16
    advantage_clip: PositiveFloat | None = None


class SFT(Frozen):
    """Cross-entropy on completions that came with the data: no teacher, no sampler."""

    needs_list: ClassVar[bool] = False
    needs_behavior: ClassVar[bool] = False
    kind: Literal["sft"] = "sft"


Sampled: TypeAlias = ScalarKL | GJS
Direct: TypeAlias = ForwardKL | ReverseKL | DirectGJS | KD | TAID | EntropyAware
Objective: TypeAlias = Annotated[
    ScalarKL | GJS | TopKPolicyGradient | ForwardKL | ReverseKL | DirectGJS | KD | TAID | EntropyAware | EOPD | SFT,
    Field(discriminator="kind"),
]


def conflict(
    objective: Objective, importance_kind: str, *, on_policy_fraction: float = 1.0, data_loss: str = "sft"
) -> str | None:
    """Why these settings make no sense together, in one line; None when they do."""
    if isinstance(objective, ScalarKL | GJS) and objective.advantage == "state" and objective.gamma == 0.0:
        return (
            "a state-only advantage at gamma 0 has no gradient: the divergence does not depend on the sampled token; "
            'set objective.gamma above 0, or objective.advantage = "token"'
        )
    if importance_kind == "ppo" and not isinstance(objective, ScalarKL | GJS):
        return (
            f"ppo clips the ratio of a sampled token's gradient, and {objective.kind} "
            + ("has none" if not objective.needs_behavior else "is one in part: its sum over the list has no ratio")
            + '; set learner.importance.kind = "truncated", or objective.kind = "gjs" or "scalar_kl"'
        )
    if isinstance(objective, TAID) and objective.t_start >= objective.t_end:
        return f"TAID moves t from t_start up to t_end; got {objective.t_start} and {objective.t_end}"
    if data_loss == "objective" and objective.needs_behavior:
        return (
            f"{objective.kind} weighs sampled tokens by the probability they were sampled with, which completions from "
            'the data do not have; use data_loss = "sft", or a direct objective such as gjs_direct'
        )
    if isinstance(objective, SFT) and on_policy_fraction not in {0.0, 1.0}:
        return "objective sft learns from the data's completions alone; leave on_policy_fraction out"
    return None
