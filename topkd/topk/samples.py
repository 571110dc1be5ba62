"""Values that the rooms exchange: sampling parameters, rollouts, behaviours and prepared samples.

Variants are discriminated unions on ``kind``; match them exhaustively::

    match sample:
        case ScalarPreparedSample(): ...
        case TopKPreparedSample(): ...
        case _: assert_never(sample)

``topkd.topk.wire`` reads and writes the same values as validated JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topkd.topk.errors import AlignmentError, ConfigError
from topkd.topk.inputs import LOGP_TOLERANCE
from topkd.topk.types import Bool, Float32, Int32, TopK

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Every sampling parameter, sent explicitly, so that a model's ``generation_config`` has no effect.

    The defaults sample from the policy itself (temperature 1, no truncation, no penalty), so the returned logprobs are
    the policy's own. ``exact`` says whether that is so. Only ``stop_token_ids``, if set, end a completion (SGLang adds
    the model's own); if not set, a server uses the end tokens in its model's files.
    """

    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        bad = [
            name
            for name, ok in (
                ("max_tokens", self.max_tokens >= 1),
                ("temperature", self.temperature >= 0.0),
                ("top_p", 0.0 < self.top_p <= 1.0),
                ("top_k", self.top_k >= 0),
                ("min_p", 0.0 <= self.min_p <= 1.0),
                ("repetition_penalty", self.repetition_penalty > 0.0),
            )
            if not ok
        ]
        if bad:
            raise ConfigError(f"sampling parameter {bad[0]} out of range", got=getattr(self, bad[0]))

    @property
    def exact(self) -> bool:
        """Whether tokens are sampled from the policy's own softmax: temperature 1, not truncated, no penalty."""
        return self == SamplingParams(self.max_tokens, stop_token_ids=self.stop_token_ids, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, with the exact log-probability that each token was sampled with.

    Attributes:
        prompt_ids: int32 [P], P >= 1.
        completion_ids: int32 [C], the stop token included when the model emitted one.
        logp: float32 [C], log-probability of each completion token under the distribution it was sampled from.
        topk: The sampler's own top-K lists (``start = P - 1``), or None.
        finish_reason: "stop", "length" or "abort".
        version: Weight version of the policy that sampled it ("" when unknown).
        sampling: The parameters it was sampled with.
    """

    prompt_ids: Int32
    completion_ids: Int32
    logp: Float32
    finish_reason: FinishReason
    sampling: SamplingParams
    topk: TopK | None = None
    version: str = ""

    def __post_init__(self) -> None:
        _freeze(self, prompt_ids=np.int32, completion_ids=np.int32, logp=np.float32)
        _length("Rollout.logp", self.logp, self.completion_ids.size)
        if self.finish_reason not in get_args(FinishReason):
            raise ConfigError(
                "Rollout.finish_reason: unknown",
                got=repr(self.finish_reason),
                expected=" or ".join(get_args(FinishReason)),
            )
        if not isinstance(self.version, str):
            raise ConfigError("Rollout.version must be text", got=repr(self.version))
        if self.prompt_ids.size < 1:
            raise AlignmentError("a rollout needs at least one prompt token")
        if self.topk is not None:
            _rows("Rollout.topk", self.topk, self.prompt_ids.size - 1, self.completion_ids)


@dataclass(frozen=True, slots=True)
class ScalarBehavior:
    """The exact logprobs that the rollout's tokens were sampled with, float32 [C]; the same in every inner step."""

    logp: Float32
    kind: Literal["scalar"] = field(default="scalar", init=False)

    def __post_init__(self) -> None:
        _freeze(self, logp=np.float32)


@dataclass(frozen=True, slots=True)
class TopKBehavior:
    """Like ``ScalarBehavior``, plus the student's top-K lists at the time of sampling."""

    logp: Float32
    topk: TopK
    kind: Literal["topk"] = field(default="topk", init=False)

    def __post_init__(self) -> None:
        _freeze(self, logp=np.float32)
        _length("TopKBehavior.topk", self.topk.actual_ids, self.logp.size)


Behavior: TypeAlias = ScalarBehavior | TopKBehavior


@dataclass(frozen=True, slots=True)
class SampleCore:
    """Fields that every prepared sample has, independent of its teacher.

    Attributes:
        full_ids: int32 [P + C], the student's prompt and the completion.
        prompt_len: P >= 1.
        mask: bool [C], True where the completion token trains; entry i belongs to row i of a TopK.
        teacher_prompt_ids: The prompt the *teacher* saw (its length may differ: a hint, another template).
        teacher_id: Name of the teacher that scored it.
        sample_id: Name of the data row that it comes from ("" when it has none).
    """

    full_ids: Int32
    prompt_len: int
    mask: Bool
    teacher_prompt_ids: Int32
    teacher_id: str = ""
    sample_id: str = ""

    def __post_init__(self) -> None:
        _freeze(self, full_ids=np.int32, mask=np.bool_, teacher_prompt_ids=np.int32)
        if not 1 <= self.prompt_len <= self.full_ids.size:
            raise AlignmentError("prompt_len out of range", got=self.prompt_len, expected=f"1..{self.full_ids.size}")
        if self.teacher_prompt_ids.size < 1:
            raise AlignmentError("the teacher's prompt needs at least one token")
        _length("SampleCore.mask", self.mask, self.completion_len)

    @property
    def completion_len(self) -> int:
        """C, the number of completion tokens."""
        return int(self.full_ids.size) - self.prompt_len

    @property
    def completion_ids(self) -> Int32:
        """The completion's token ids, int32 [C]."""
        return self.full_ids[self.prompt_len :]

    @property
    def input_ids(self) -> Int32:
        """The model's input, int32 [P + C - 1]; logit row P - 1 predicts the first completion token."""
        return self.full_ids[:-1]

    @property
    def target_ids(self) -> Int32:
        """The token that each input position should predict, int32 [P + C - 1]."""
        return self.full_ids[1:]


@dataclass(frozen=True, slots=True)
class TextSample:
    """A completion from the data: ids and a mask, no logprobs."""

    core: SampleCore


@dataclass(frozen=True, slots=True)
class ScalarPreparedSample:
    """A sample with the teacher's logprobs of the realised tokens only, float32 [C]; NaN = unknown, and masked."""

    core: SampleCore
    behavior: Behavior
    teacher_logp: Float32
    kind: Literal["scalar"] = field(default="scalar", init=False)

    def __post_init__(self) -> None:
        _freeze(self, teacher_logp=np.float32)
        _length("ScalarPreparedSample.teacher_logp", self.teacher_logp, self.core.completion_len)
        _behaved("ScalarPreparedSample.behavior", self.behavior, self.core)


@dataclass(frozen=True, slots=True)
class TopKPreparedSample:
    """A sample with the teacher's top-K lists, C rows; ``teacher.start`` is the *teacher's* prompt length - 1."""

    core: SampleCore
    behavior: Behavior
    teacher: TopK
    kind: Literal["topk"] = field(default="topk", init=False)

    def __post_init__(self) -> None:
        _behaved("TopKPreparedSample.behavior", self.behavior, self.core)
        _rows(
            "TopKPreparedSample.teacher", self.teacher, self.core.teacher_prompt_ids.size - 1, self.core.completion_ids
        )
        if (self.teacher.actual_ids < 0).any():
            raise AlignmentError("a teacher row lacks its realised token", where="TopKPreparedSample.teacher", got="-1")

    @property
    def teacher_logp(self) -> Float32:
        """The teacher's exact logprob of each realised token, float32 [C]; NaN = unknown."""
        return self.teacher.actual_logp


PreparedSample: TypeAlias = ScalarPreparedSample | TopKPreparedSample


def _freeze(value: object, **dtypes: Any) -> None:
    for name, dtype in dtypes.items():
        object.__setattr__(value, name, _vector(f"{type(value).__name__}.{name}", getattr(value, name), dtype))


def _vector(name: str, value: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    array = np.asarray(value)
    if array.ndim != 1:
        raise ConfigError(f"{name}: not one-dimensional", got=array.shape)
    if array.size and dtype is np.int32 and array.dtype.kind not in "iu":
        raise ConfigError(f"{name}: token ids must be integers", got=array.dtype)
    if array.size and dtype is np.int32 and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ConfigError(f"{name}: token id out of range", got=f"{array.min()}..{array.max()}", expected="0..2**31-1")
    if array.size and dtype is np.float32 and array.dtype.kind not in "iuf":
        raise ConfigError(f"{name}: logprobs must be numbers", got=array.dtype)
    if array.size and dtype is np.float32 and np.fmax.reduce(array) > LOGP_TOLERANCE:
        raise ConfigError(f"{name}: logprob above 0", got=f"{np.fmax.reduce(array):.6g}")
    if array.size and dtype is np.bool_ and array.dtype != np.bool_:
        # Integers 0 and 1, read as labels with -100, would keep every token; a boolean mask cannot be misread.
        raise ConfigError(f"{name}: a mask must be boolean", got=array.dtype, expected="bool")
    if array.dtype != dtype or array.flags.writeable:
        array = array.astype(dtype)
        array.flags.writeable = False
    return array


def _length(name: str, array: NDArray[Any], expected: int) -> None:
    if array.shape[0] != expected:
        raise AlignmentError(f"{name}: wrong number of rows", got=array.shape[0], expected=expected)


def _rows(name: str, topk: TopK, start: int, completion_ids: Int32) -> None:
    """Refuse rows of another position or completion; an unknown realised token (-1) matches any token."""
    _length(name, topk.actual_ids, completion_ids.size)
    if topk.start != start:
        raise AlignmentError(f"{name}: TopK.start is not the prompt length - 1", got=topk.start, expected=start)
    differ = (topk.actual_ids != completion_ids) & (topk.actual_ids >= 0)
    if differ.any():
        row = int(np.argmax(differ))
        raise AlignmentError(
            f"{name}: rows score another completion",
            where=f"row {row}",
            got=f"token {topk.actual_ids[row]}",
            expected=f"token {completion_ids[row]}",
        )


def _behaved(name: str, behavior: Behavior, core: SampleCore) -> None:
    _length(name, behavior.logp, core.completion_len)
    if isinstance(behavior, TopKBehavior):
        _rows(f"{name}.topk", behavior.topk, core.prompt_len - 1, core.completion_ids)
