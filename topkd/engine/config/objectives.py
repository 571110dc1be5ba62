"""Objectives: one settings class each, which also says what the objective needs from the teacher and the rollouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from topkd.engine.config.learner import Frozen
from topkd.topk.errors import ConfigError

Beta: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
Gamma: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]
Tail: TypeAlias = Literal["bucket", "renormalise"]
Support: TypeAlias = Literal["teacher", "student", "union"]


class ObjectiveSettings(Frozen):
    """Settings of an objective, and what it needs from teacher and rollouts.

    Attributes:
        kind: Its name in a config; the key of its loss in ``topkd.engine.learner.losses``.
        is_data_only: It trains only on completions from the data, and uses no teacher.
        allows_ppo: PPO can clip it, because every term of its gradient has the ratio of a sampled token.
    """

    kind: str
    allows_ppo: ClassVar[bool] = False
    is_data_only: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The objective's name in the run log."""
        return self.kind

    @property
    def needs_list(self) -> bool:
        """Whether the loss reads the teacher's top-K list, and not only the realised token's logprob."""
        return not self.is_data_only

    @property
    def needs_behavior(self) -> bool:
        """Whether the loss needs the probability that each token was sampled with; a direct loss does not."""
        return not self.is_data_only

    @property
    def list_support(self) -> Support:
        """Whose top-K list the loss reads: the teacher's, the student's, or the union of both."""
        support: Support = getattr(self, "support", "teacher")
        return support

    @property
    def needs_finite_teacher(self) -> bool:
        """Whether the loss is infinite for a realised token to which the teacher gives probability zero."""
        return False

    @property
    def sums_returns(self) -> bool:
        """Whether a token's loss includes the divergences at later positions."""
        return bool(getattr(self, "gamma", 0.0) > 0.0)

    def count_entries(self, k: int) -> int:
        """Count the logprobs that the teacher sends for each token, with lists of ``k`` entries."""
        return k + 1 if self.needs_list else 1

    def find_conflict(
        self, importance_kind: str, *, on_policy_fraction: float = 1.0, data_loss: str = "sft"
    ) -> str | None:
        """Return one line that says why these settings cannot be combined; None when they can."""
        if (why := self._find_own_conflict()) is not None:
            return why
        if self.is_data_only and on_policy_fraction not in {0.0, 1.0}:
            return f"objective {self.name} trains on completions from the data only; leave on_policy_fraction out"
        if importance_kind == "ppo" and not self.allows_ppo:
            return (
                f"ppo clips the ratios of sampled tokens, and {self.name} "
                + ("also sums over the teacher's list, which has no ratio" if self.needs_behavior else "uses no ratio")
                + '; set learner.importance.kind = "truncated", or objective.kind = "gjs" or "scalar_kl"'
            )
        if data_loss == "objective" and self.needs_behavior:
            return (
                f"{self.name} weighs sampled tokens by the probability they were sampled with, which completions from "
                'the data do not have; use data_loss = "sft", or a direct objective such as gjs_direct'
            )
        return None

    def _find_own_conflict(self) -> str | None:
        """Return why the objective's own settings cannot be combined."""
        return None


class _Sampled(ObjectiveSettings):
    """A policy gradient on the sampled token.

    ``baseline = "value"`` subtracts the position's mean advantage, computed from the teacher's list; only the variance
    changes. ``gamma`` > 0 subtracts the discounted divergences of later positions. ``advantage_clip`` bounds each
    token's |A|, after the baseline. ``advantage = "state"`` leaves out the token's own advantage: only later positions
    count.
    """

    allows_ppo: ClassVar[bool] = True
    baseline: Literal["none", "value"] = "none"
    gamma: Gamma = 0.0
    advantage_clip: PositiveFloat | None = None
    advantage: Literal["token", "state"] = "token"

    @property
    def needs_list(self) -> bool:
        """Whether a baseline or a return is used, because both are sums over the list."""
        return self.baseline == "value" or self.sums_returns

    @property
    def needs_finite_teacher(self) -> bool:
        """Whether the advantage is a log-ratio, as it is at ``beta = 1``."""
        return isinstance(self, ScalarKL | GJS) and self.beta == 1.0

    def _find_own_conflict(self) -> str | None:
        if self.advantage == "state" and not self.sums_returns:
            return (
                "a state-only advantage at gamma 0 has no gradient: the divergence does not depend on the sampled "
                'token; set objective.gamma above 0, or objective.advantage = "token"'
            )
        return None


class ScalarKL(_Sampled):
    """Sampled-token reverse KL: A = log t(y) - log s(y)."""

    beta: ClassVar[float] = 1.0
    kind: Literal["scalar_kl"] = "scalar_kl"


class GJS(_Sampled):
    """Sampled-token generalised Jensen-Shannon: A = (1-beta) log(beta t(y)/s(y) + 1 - beta)."""

    kind: Literal["gjs"] = "gjs"
    beta: Beta = 0.5


class TopKPolicyGradient(ObjectiveSettings):
    """A sum over the teacher's top-K list plus a sampled tail (docs/math.md): unbiased at lam = 1, less noisy below.

    ``support`` says whose list the sum goes over; ``student`` and ``union`` need a teacher that scores chosen ids.
    """

    kind: Literal["topk_pg"] = "topk_pg"
    beta: Beta = 0.5
    lam: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    gamma: Gamma = 0.0
    support: Support = "teacher"


class _Direct(ObjectiveSettings):
    """A loss on the teacher's whole list, differentiated through the student; it needs no sampled token."""

    @property
    def needs_behavior(self) -> bool:
        """False: a direct loss has no ratio of a sampled token."""
        return False


class ForwardKL(_Direct):
    """KL(T||S) over the teacher's listed tokens; all others are one bin, or ignored (``tail = "renormalise"``)."""

    beta: ClassVar[float] = 0.0
    kind: Literal["fkl"] = "fkl"
    tail: Tail = "bucket"


class ReverseKL(_Direct):
    """KL(S||T) over the teacher's listed tokens, with the same ``tail`` as ``ForwardKL``."""

    beta: ClassVar[float] = 1.0
    kind: Literal["rkl"] = "rkl"
    tail: Tail = "bucket"


class DirectGJS(_Direct):
    """Generalised Jensen-Shannon divergence (GKD) over the teacher's listed tokens, ``tail`` as in ``ForwardKL``."""

    kind: Literal["gjs_direct"] = "gjs_direct"
    beta: Beta = 0.5
    tail: Tail = "bucket"


class KD(_Direct):
    """Cross-entropy against the teacher's list and tail, KL(T||S) + H(T): the classical distillation loss."""

    kind: Literal["kd"] = "kd"
    tail: Tail = "bucket"


class TAID(_Direct):
    """Cross-entropy against a target that moves from the student (t = 0) to the teacher (t = 1) during the run.

    t grows from ``t_start`` to ``t_end``. ``alpha`` and ``momentum`` set how much faster than linear it grows while the
    loss falls; with ``adaptive = false`` it is linear.
    """

    kind: Literal["taid"] = "taid"
    tail: Tail = "bucket"
    t_start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.4
    t_end: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    alpha: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 5e-4
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    adaptive: bool = True

    def _find_own_conflict(self) -> str | None:
        if self.t_start >= self.t_end:
            return f"TAID moves t from t_start up to t_end; got {self.t_start} and {self.t_end}"
        return None


class EntropyAware(_Direct):
    """w KL(T||S) + (1-w) KL(S||T), w = clamp(H_T / h_max, 0, 1), with the list's lower bound of H_T."""

    kind: Literal["entropy_aware"] = "entropy_aware"
    h_max: PositiveFloat | None = None


class EOPD(ObjectiveSettings):
    """Sampled-token reverse KL, plus alpha KL(T~_k||S) where the teacher's entropy is surely at least tau nats."""

    kind: Literal["eopd"] = "eopd"
    tau: Annotated[float, Field(allow_inf_nan=False)] = 0.8
    alpha: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    top: PositiveInt = 16
    advantage_clip: PositiveFloat | None = None


class SFT(ObjectiveSettings):
    """Cross-entropy on completions from the data, without teacher or sampler."""

    is_data_only: ClassVar[bool] = True
    kind: Literal["sft"] = "sft"


class CustomObjective(ObjectiveSettings):
    """A loss function of your own: ``kind = "module:function"`` or ``kind = "file.py:function"``.

    The function is called with a ``TokenView`` and returns the loss of each token. ``reads_list = false``: the view has
    no list, and the teacher sends one logprob per token. ``reads_sampled_token = false``: the completions need not be
    sampled from the student, as for a direct loss. ``support`` says whose list the view has.
    """

    allows_ppo: ClassVar[bool] = True
    kind: Literal["custom"] = "custom"
    function: str
    reads_list: bool = True
    reads_sampled_token: bool = True
    support: Support = "teacher"

    @property
    def name(self) -> str:
        """The function's name in the config."""
        return self.function

    @property
    def needs_list(self) -> bool:
        """Whether the config sets ``reads_list``."""
        return self.reads_list

    @property
    def needs_behavior(self) -> bool:
        """Whether the config sets ``reads_sampled_token``."""
        return self.reads_sampled_token

    @model_serializer(mode="wrap")
    def _dump_function_as_kind(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        return {"kind": values.pop("function"), **{key: value for key, value in values.items() if key != "kind"}}

    @classmethod
    def of_function(cls, function: Callable[..., Any], in_place_of: ObjectiveSettings) -> CustomObjective:
        """Make settings for a function passed as an argument; it needs what the objective it replaces needs."""
        check_loss_function(function, where=(name := name_function(function)))
        return cls(
            function=name,
            reads_list=in_place_of.needs_list if isinstance(in_place_of, CustomObjective) else True,
            reads_sampled_token=in_place_of.needs_behavior,
            support=in_place_of.list_support,
        )


Direct: TypeAlias = ForwardKL | ReverseKL | DirectGJS | KD | TAID | EntropyAware
Objective: TypeAlias = Annotated[
    ScalarKL
    | GJS
    | TopKPolicyGradient
    | ForwardKL
    | ReverseKL
    | DirectGJS
    | KD
    | TAID
    | EntropyAware
    | EOPD
    | SFT
    | CustomObjective,
    Field(discriminator="kind"),
]


def expand_kind(values: Mapping[str, Any], default: str) -> dict[str, Any]:
    """Return an objective's table with its kind filled in: ``default`` if missing, ``custom`` for a function."""
    kind = values.get("kind", default)
    tag = find_kind_tag(kind)
    return {**values, "kind": kind} if tag == str(kind) else {**values, "kind": tag, "function": kind}


def find_kind_tag(kind: object) -> str:
    """Return the kind that decides a table's keys: ``custom`` for ``module:function`` and ``file.py:function``."""
    return "custom" if isinstance(kind, str) and ":" in kind else str(kind)


def name_function(function: Callable[..., Any]) -> str:
    """Return ``module:qualified name`` of a function, or of a callable object's class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def check_loss_function(function: Callable[..., Any], *, where: str) -> None:
    """Raise ConfigError for a function that cannot be called with a ``TokenView`` alone, or is a coroutine."""
    expected = "a function of one TokenView that returns the loss of each token"
    if inspect.iscoroutinefunction(function):
        raise ConfigError("a loss function must not be async", where=where, got="async def", expected=expected)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    try:
        signature.bind(object())
    except TypeError as error:
        raise ConfigError(
            "a loss function must take one argument", where=where, got=f"{signature} ({error})", expected=expected,
            hint="give the other parameters defaults, or bind them with functools.partial",
        ) from error  # fmt: skip
