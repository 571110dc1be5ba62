"""Request bodies of vLLM 0.32 and its checks of them. Unknown fields are ignored, as there.

Known fields that this server does not do are in ``unsupported``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from topkd.serve.engine.jobs import SamplingJob
from topkd.serve.engine.refusal import Refusal, bad_parameter, restate_error

MAX_N = 16_384  # vLLM's
MAX_NAMED_IDS = 128  # of logprob_token_ids, vLLM's
INT64 = 2**63
TokenId = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """Fields that every request shares."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None


class SamplingFields(BaseModel):
    """Sampling fields, the same on every route."""

    model_config = ConfigDict(extra="allow")

    max_temperature: ClassVar[float] = 2.0
    min_temperature: ClassVar[float] = 0.01  # vLLM raises smaller ones to it, but for 0
    max_bias: ClassVar[float] = math.inf  # larger biases count as this
    greedy_n: ClassVar[bool] = False  # several greedy completions would be one, several times
    any_stop_ids: ClassVar[bool] = False  # stop_token_ids outside the vocabulary mean nothing, instead of 400

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None

    def sampling(
        self,
        *,
        max_tokens: int,
        logprobs: int | None,
        vocab: int,
        detokenize: bool = True,
        scaled_logprobs: bool = False,
    ) -> SamplingJob:
        """Check the parameters and return a SamplingJob."""
        heat = 1.0 if self.temperature is None else self.temperature
        stop_ids = self.stop_token_ids or []
        if self.any_stop_ids:
            stop_ids = [token for token in stop_ids if 0 <= token < vocab]
        chosen = SamplingJob(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=max(heat, self.min_temperature) if heat > 0 else heat,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k is None else self.top_k,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed == -1 else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=frozenset(stop_ids),
            include_stop=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids or ()),
            logit_bias=_bias(self.logit_bias, self.max_bias),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            detokenize=detokenize,
            scaled_logprobs=scaled_logprobs,
        )
        if self.n < 1:
            raise Refusal(f"n must be at least 1, got {self.n}.")
        if self.n > MAX_N:  # before anything is made for each of them: a single request could take all memory
            raise Refusal(f"n must be at most {MAX_N}, got {self.n}.")
        _check_ranges(chosen, self.max_temperature)
        if chosen.greedy and self.n > 1 and not self.greedy_n:
            raise Refusal(f"n must be 1 when using greedy sampling, got {self.n}.")
        if "" in chosen.stop:
            raise Refusal("stop cannot contain an empty string.")
        if self.allowed_token_ids == []:
            raise bad_parameter("allowed_token_ids is not None and empty!", "allowed_token_ids", [])
        _check_named_ids(chosen, vocab)
        return chosen


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class OpenAIBody(Body, SamplingFields):
    """Fields that both OpenAI routes share."""

    max_bias: ClassVar[float] = 100.0

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True
    return_token_ids: bool | None = None
    return_weight_versions: bool | None = None  # from vLLM 0.33 on
    return_tokens_as_token_ids: bool | None = None


class CompletionBody(OpenAIBody):
    """``/v1/completions``."""

    prompt: list[TokenId] | list[list[TokenId]] | str | list[str] | None = None
    echo: bool | None = False
    # null is the default too
    max_tokens: Annotated[int, BeforeValidator(lambda value: 16 if value is None else value)] = 16
    logprobs: int | None = None


class TemplateFields(BaseModel):
    """What a request says of the chat template."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tools: list[dict[str, Any]] | None = None


class ChatBody(OpenAIBody, TemplateFields):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]]
    n: Annotated[int, BeforeValidator(lambda value: 1 if value is None else value)] = 1
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    add_special_tokens: bool = False
    tool_choice: str | dict[str, Any] | None = None
    return_prompt_text: bool | None = None

    @property
    def limit(self) -> int | None:
        """Output tokens that were asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def role(self) -> str:
        """Who says what is drawn."""
        return "assistant" if self.add_generation_prompt else str(self.messages[-1].get("role"))


class GenerateSampling(SamplingFields):
    """``sampling_params`` of ``/inference/v1/generate``."""

    logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    prompt_logprob_token_ids: list[list[int]] | None = None
    prompt_logprob_start: int | None = None


class GenerateBody(Body):
    """``/inference/v1/generate``."""

    token_ids: list[TokenId]
    sampling_params: GenerateSampling = Field(default_factory=GenerateSampling)
    stream: bool | None = False
    output_mode: Literal["tokens", "text"] = "tokens"
    return_token_ids: bool | None = None

    @field_validator("sampling_params", mode="wrap")
    @classmethod
    def _or_an_instance(cls, value: object, handler: ValidatorFunctionWrapHandler) -> GenerateSampling:
        # vLLM's field takes an instance of its own class too, so whatever is wrong inside is reported beside that.
        try:
            return handler(value)  # type: ignore[no-any-return]
        except ValidationError as error:
            instance = {"type": "is_instance_of", "loc": (), "input": value, "ctx": {"class": "SamplingParams"}}
            raise restate_error(error, [instance, *error.errors(include_url=False)]) from error


class TokenizeBody(Body, TemplateFields):
    """``/tokenize``."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # true with a prompt, false with messages
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    """``/detokenize``."""

    tokens: list[TokenId]


def check_k(
    k: int | None, vocab: int, limit: int, *, what: Literal["prompt", "sample"], field: str | None = None
) -> int | None:
    """Return the requested K, -1 meaning the vocabulary, within the server's limit.

    Args:
        k: As asked for.
        vocab: Its size.
        limit: The most the server gives; -1 is no limit.
        what: Of the prompt or of what is drawn.
        field: The OpenAI routes' name for it, which have their own words; None on the other route.
    """
    if k is None:
        return None
    param = "prompt_logprobs" if what == "prompt" else "logprobs"
    if k < -1:
        message = (
            f"`{field}` must be a positive value or -1." if field else f"{param} must be non-negative or -1, got {k}."
        )
        raise bad_parameter(message, field or param, k)
    wanted = vocab if k == -1 else k
    if wanted > limit >= 0:
        message = f"Requested {what} logprobs of {wanted}, which is greater than max allowed: {limit}"
        raise bad_parameter(message, param, wanted)
    return min(wanted, vocab)


def check_prompt_ids(ids: list[int] | tuple[int, ...], vocab: int) -> tuple[int, ...]:
    """Return the prompt ids; refuse an empty prompt and ids outside the vocabulary."""
    if not ids:
        raise Refusal("The decoder prompt cannot be empty")
    if (worst := max(ids)) >= vocab:
        raise Refusal(f"Token id {worst} is out of vocabulary")
    return tuple(ids)


def check_candidate_ids(
    fields: GenerateSampling, prompt_length: int, vocab: int, limit: int
) -> tuple[NDArray[np.int32] | None, int]:
    """Return (ids [rows, C] padded with -1, start), or (None, 0) without candidates."""
    rows, start = fields.prompt_logprob_token_ids, fields.prompt_logprob_start
    name = "prompt_logprob_token_ids"
    if rows is None:
        if start is not None:
            raise bad_parameter(f"prompt_logprob_start requires {name}.", "prompt_logprob_start", start)
        return None, 0
    start = start or 0
    if start < 0:
        raise bad_parameter("prompt_logprob_start must be non-negative.", "prompt_logprob_start", start)
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise bad_parameter(f"{name} must be a non-empty integer array of shape [num_rows, num_ids].", name, "list")
    if columns > limit >= 0:
        message = (
            f"Requested {columns} token ids per row in {name}, which is greater than max allowed: {limit}. "
            f"Set max_logprobs (--max-logprobs) to at least {columns}."
        )
        raise bad_parameter(message, name, columns)
    scored = max(0, prompt_length - 1 - start)
    if len(rows) != scored:
        message = (
            f"{name} has {len(rows)} rows, but the prompt has {scored} scored rows "
            "(prompt_len - 1 - prompt_logprob_start)."
        )
        raise bad_parameter(message, name, len(rows))
    low, high = min(min(row, default=0) for row in rows), max(max(row, default=0) for row in rows)
    if low < -1 or high >= vocab:
        message = f"{name} contain out-of-vocab token ids (-1 pads a row). Vocabulary size: {vocab}"
        raise bad_parameter(message, name, [low, high])
    padded = np.full((scored, columns), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded, start


def check_max_tokens(value: int) -> int:
    """Refuse a request for no tokens."""
    if value < 1:
        raise bad_parameter(f"max_tokens must be at least 1, got {value}.", "max_tokens", value)
    return value


def _bias(biases: dict[str, float] | None, most: float) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), min(most, max(-most, float(bias)))) for token, bias in (biases or {}).items())
    except ValueError as error:
        raise bad_parameter(f"logit_bias keys must be token ids: {error}.", "logit_bias") from error


def _check_ranges(chosen: SamplingJob, max_temperature: float) -> None:
    # `not (low <= x)` also refuses NaN. vLLM names the parameter of some of them and not of others.
    heat = chosen.temperature
    if not heat >= 0:
        raise bad_parameter(f"temperature must be non-negative, got {heat}.", "temperature", heat)
    if not heat <= max_temperature:
        raise bad_parameter(f"temperature must be in [0, {max_temperature:g}], got {heat}.", "temperature", heat)
    if not 0 < chosen.top_p <= 1:
        raise bad_parameter(f"top_p must be in (0, 1], got {chosen.top_p}.", "top_p", chosen.top_p)
    ranges: list[tuple[str, float, bool, str]] = [
        ("presence_penalty", chosen.presence_penalty, abs(chosen.presence_penalty) <= 2, "in [-2, 2]"),
        ("frequency_penalty", chosen.frequency_penalty, abs(chosen.frequency_penalty) <= 2, "in [-2, 2]"),
        ("repetition_penalty", chosen.repetition_penalty, chosen.repetition_penalty > 0, "greater than zero"),
        ("top_k", chosen.top_k, chosen.top_k >= -1, "0 (disable), or at least 1"),
        ("min_p", chosen.min_p, 0 <= chosen.min_p <= 1, "in [0, 1]"),
        ("min_tokens", chosen.min_tokens, chosen.min_tokens >= 0, "greater than or equal to 0"),
        (
            "min_tokens",
            chosen.min_tokens,
            chosen.min_tokens <= chosen.max_tokens,
            f"less than or equal to max_tokens={chosen.max_tokens}",
        ),
    ]
    for name, value, holds, expected in ranges:
        if not holds:
            raise Refusal(f"{name} must be {expected}, got {value}.")


def _check_named_ids(chosen: SamplingJob, vocab: int) -> None:
    named = {
        "allowed_token_ids": chosen.allowed_token_ids,
        "logprob_token_ids": chosen.logprob_token_ids,
        "logit_bias": tuple(token for token, _ in chosen.logit_bias),
        "stop_token_ids": tuple(chosen.stop_token_ids),
    }
    for name, ids in named.items():
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise bad_parameter(f"{name} contains out-of-vocab token id {outside[0]}.", name, outside[0])
    if (count := len(chosen.logprob_token_ids)) > MAX_NAMED_IDS:
        message = f"Requested logprob_token_ids of length {count}, which is greater than max allowed: {MAX_NAMED_IDS}"
        raise bad_parameter(message, "logprob_token_ids", count)
