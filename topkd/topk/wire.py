"""Samples, rollouts and top-K rows as strict JSON, one value per line in a file.

Every written value is read back equal: float32 exactly, NaN (unknown) as null, -inf (probability zero) as "-inf".
Unions have the tag ``kind``. Unknown keys, missing keys and wrong types are refused, with file and line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from topkd.topk.errors import DataError, TopkdError
from topkd.topk.samples import (
    Behavior,
    FinishReason,
    PreparedSample,
    Rollout,
    SampleCore,
    SamplingParams,
    ScalarBehavior,
    ScalarPreparedSample,
    TopKBehavior,
    TopKPreparedSample,
)
from topkd.topk.types import TopK

Value: TypeAlias = TopK | Behavior | PreparedSample | Rollout


def _integers(value: object) -> object:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ValueError("not a list of integers")
    if any(not -1 <= item <= 2**31 - 1 for item in value):
        raise ValueError("token id out of range")
    return np.array(value, dtype=np.int32)


def _booleans(value: object) -> object:
    if not isinstance(value, list) or any(type(item) is not bool for item in value):
        raise ValueError("not a list of true and false")
    return np.array(value, dtype=np.bool_)


def _logprob(item: object) -> float:
    if item is None:
        return np.nan
    if item == "-inf":
        return -np.inf
    if type(item) not in (int, float):
        raise ValueError('a logprob is a number, null (unknown) or "-inf" (probability zero)')
    return cast("float", item)


def _logprobs(value: object) -> object:
    if not isinstance(value, list):
        raise ValueError("not a list of logprobs")  # noqa: TRY004 - pydantic turns ValueError into its own error
    plain = all(type(item) is float for item in value)
    numbers = np.array(value if plain else [_logprob(item) for item in value], dtype=np.float64)
    if (np.isfinite(numbers) & (np.abs(numbers) > np.finfo(np.float32).max)).any():
        raise ValueError("a logprob does not fit float32")
    return numbers.astype(np.float32)


Ids = Annotated[NDArray[np.int32], BeforeValidator(_integers)]
Mask = Annotated[NDArray[np.bool_], BeforeValidator(_booleans)]
Logprobs = Annotated[NDArray[np.float32], BeforeValidator(_logprobs)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class _TopK(_Wire):
    start: int
    k: int = Field(ge=0)
    ids: list[Ids]
    logp: list[Logprobs]
    actual_ids: Ids
    actual_logp: Logprobs
    tail_logp: Logprobs

    def value(self) -> TopK:
        if any(len(row) != self.k for table in (self.ids, self.logp) for row in table):
            raise DataError("a row of ids or logp does not have k entries", expected=f"k = {self.k}")
        ids = np.array(self.ids, dtype=np.int32).reshape(len(self.ids), self.k)
        logp = np.array(self.logp, dtype=np.float32).reshape(len(self.logp), self.k)
        return TopK(self.start, ids, logp, self.actual_ids, self.actual_logp, self.tail_logp)


class _ScalarBehavior(_Wire):
    kind: Literal["scalar"]
    logp: Logprobs

    def value(self) -> ScalarBehavior:
        return ScalarBehavior(cast("Any", self.logp))


class _TopKBehavior(_Wire):
    kind: Literal["topk"]
    logp: Logprobs
    topk: _TopK

    def value(self) -> TopKBehavior:
        return TopKBehavior(cast("Any", self.logp), self.topk.value())


_Behavior = Annotated[_ScalarBehavior | _TopKBehavior, Field(discriminator="kind")]


class _Core(_Wire):
    full_ids: Ids
    prompt_len: int
    mask: Mask
    teacher_prompt_ids: Ids
    teacher_id: str
    sample_id: str

    def value(self) -> SampleCore:
        return SampleCore(**dict(self))


class _ScalarSample(_Wire):
    kind: Literal["scalar"]
    core: _Core
    behavior: _Behavior
    teacher_logp: Logprobs

    def value(self) -> ScalarPreparedSample:
        return ScalarPreparedSample(self.core.value(), self.behavior.value(), cast("Any", self.teacher_logp))


class _TopKSample(_Wire):
    kind: Literal["topk"]
    core: _Core
    behavior: _Behavior
    teacher: _TopK

    def value(self) -> TopKPreparedSample:
        return TopKPreparedSample(self.core.value(), self.behavior.value(), self.teacher.value())


class _Sampling(_Wire):
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop_token_ids: list[int]
    seed: int | None

    def value(self) -> SamplingParams:
        return SamplingParams(**{**dict(self), "stop_token_ids": tuple(self.stop_token_ids)})


class _Rollout(_Wire):
    kind: Literal["rollout"]
    prompt_ids: Ids
    completion_ids: Ids
    logp: Logprobs
    finish_reason: FinishReason
    sampling: _Sampling
    topk: _TopK | None
    version: str

    def value(self) -> Rollout:
        fields = {name: value for name, value in self if name not in {"kind", "sampling", "topk"}}
        return Rollout(**fields, sampling=self.sampling.value(), topk=None if self.topk is None else self.topk.value())


_READERS: dict[str, TypeAdapter[Any]] = {
    "topk": TypeAdapter(_TopK),
    "behavior": TypeAdapter(_Behavior),
    "sample": TypeAdapter(Annotated[_ScalarSample | _TopKSample, Field(discriminator="kind")]),
    "rollout": TypeAdapter(_Rollout),
}


def dumps(value: Value) -> str:
    """Return one line of JSON, from which ``loads_*`` reads an equal value."""
    return msgspec.json.encode(_plain(value)).decode()


def loads_topk(text: str | bytes, *, where: str = "") -> TopK:
    """Read a ``TopK`` from JSON; raise DataError (naming ``where``) for anything else."""
    return cast("TopK", _load("topk", text, where))


def loads_behavior(text: str | bytes, *, where: str = "") -> Behavior:
    """Read a ``ScalarBehavior`` or ``TopKBehavior``, by its ``kind``."""
    return cast("Behavior", _load("behavior", text, where))


def loads_sample(text: str | bytes, *, where: str = "") -> PreparedSample:
    """Read a ``ScalarPreparedSample`` or ``TopKPreparedSample``, by its ``kind``."""
    return cast("PreparedSample", _load("sample", text, where))


def loads_rollout(text: str | bytes, *, where: str = "") -> Rollout:
    """Read a ``Rollout`` from JSON."""
    return cast("Rollout", _load("rollout", text, where))


def write_samples(path: str | Path, samples: Iterable[PreparedSample]) -> int:
    """Write one sample per line, replacing an old file; return how many."""
    return _write(path, samples)


def read_samples(path: str | Path) -> Iterator[PreparedSample]:
    """Yield the samples of a file from ``write_samples``; a DataError names file and line."""
    return cast("Iterator[PreparedSample]", _read("sample", path))


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> int:
    """Write one rollout per line, replacing an old file; return how many."""
    return _write(path, rollouts)


def read_rollouts(path: str | Path) -> Iterator[Rollout]:
    """Yield the rollouts of a file from ``write_rollouts``; a DataError names file and line."""
    return cast("Iterator[Rollout]", _read("rollout", path))


def _write(path: str | Path, values: Iterable[Value]) -> int:
    count = 0
    try:
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            for value in values:
                file.write(dumps(value) + "\n")
                count += 1
    except OSError as error:
        raise DataError("the file cannot be written", where=str(path), got=error.strerror) from error
    return count


def _read(reader: str, path: str | Path) -> Iterator[Any]:
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _load(reader, line, f"{path}, line {number}")
    except OSError as error:
        raise DataError("the file cannot be read", where=str(path), got=error.strerror) from error


def _load(reader: str, text: str | bytes, where: str) -> Any:
    try:
        decoded = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError("not JSON", where=where, got=str(error)) from error
    try:
        return _READERS[reader].validate_python(decoded).value()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"not a {reader}: {place or 'the value'}: {message}", where=where) from error
    except TopkdError as error:
        raise DataError(f"not a {reader}: {error}", where=where) from error


def _plain(value: Value) -> dict[str, Any]:
    match value:
        case TopK():
            return {
                "start": value.start,
                "k": value.k,
                "ids": value.ids.tolist(),
                "logp": [_numbers(row) for row in value.logp],
                "actual_ids": value.actual_ids.tolist(),
                "actual_logp": _numbers(value.actual_logp),
                "tail_logp": _numbers(value.tail_logp),
            }
        case ScalarBehavior():
            return {"kind": value.kind, "logp": _numbers(value.logp)}
        case TopKBehavior():
            return {"kind": value.kind, "logp": _numbers(value.logp), "topk": _plain(value.topk)}
        case ScalarPreparedSample():
            return {**_sample(value), "teacher_logp": _numbers(value.teacher_logp)}
        case TopKPreparedSample():
            return {**_sample(value), "teacher": _plain(value.teacher)}
        case Rollout():
            sampling = value.sampling
            return {
                "kind": "rollout",
                "prompt_ids": value.prompt_ids.tolist(),
                "completion_ids": value.completion_ids.tolist(),
                "logp": _numbers(value.logp),
                "finish_reason": value.finish_reason,
                "sampling": {name: getattr(sampling, name) for name in _Sampling.model_fields},
                "topk": None if value.topk is None else _plain(value.topk),
                "version": value.version,
            }


def _sample(value: PreparedSample) -> dict[str, Any]:
    core = value.core
    return {
        "kind": value.kind,
        "core": {
            "full_ids": core.full_ids.tolist(),
            "prompt_len": core.prompt_len,
            "mask": core.mask.tolist(),
            "teacher_prompt_ids": core.teacher_prompt_ids.tolist(),
            "teacher_id": core.teacher_id,
            "sample_id": core.sample_id,
        },
        "behavior": _plain(value.behavior),
    }


def _numbers(values: NDArray[np.floating]) -> list[float | str | None]:
    """Return exact numbers (float32 values as doubles), null for NaN, "-inf" for -inf."""
    plain: list[float | str | None] = values.tolist()
    for index in np.flatnonzero(~np.isfinite(values)).tolist():
        plain[index] = None if np.isnan(values[index]) else "-inf"
    return plain
