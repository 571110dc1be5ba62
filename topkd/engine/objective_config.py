"""Objectives as a config says them: a union discriminated by ``kind``."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from topkd.engine.frozen import Frozen


class ScalarKL(Frozen):
    """Sampled-token reverse KL: A = log t(y) - log s(y)."""

    kind: Literal["scalar_kl"] = "scalar_kl"


class GJS(Frozen):
    """Sampled-token generalised Jensen-Shannon: A = (1-beta) log(beta t(y)/s(y) + 1 - beta), beta on the teacher."""

    kind: Literal["gjs"] = "gjs"
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class TopKPolicyGradient(Frozen):
    """The sum over the teacher's top-K plus a sampled tail, docs/math.md: unbiased at lam = 1, less noisy below."""

    kind: Literal["topk_pg"] = "topk_pg"
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3


Objective: TypeAlias = Annotated[ScalarKL | GJS | TopKPolicyGradient, Field(discriminator="kind")]
