"""Sampling replies of ``/v1/completions`` to ``Rollout``: ids, exact logprobs, the sampler's own list. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import msgspec
import numpy as np

from topkd.clients.decoding.checks import LOWEST, Entries, build_scores
from topkd.clients.decoding.vllm_typed import Logprob, as_ids, entries_of, typed
from topkd.topk.errors import AlignmentError, ResponseError, ServerBusyError
from topkd.topk.samples import FinishReason, Rollout, SamplingParams
from topkd.topk.types import Float64, Int32, TopK

_PREFIX = "token_id:"


class Logprobs(msgspec.Struct):
    """``logprobs`` of a choice, with tokens as ``token_id:N``."""

    token_logprobs: list[float | None]
    tokens: list[str] = []
    top_logprobs: list[dict[str, float | None] | None] | None = None


class Span(msgspec.Struct):
    """Completion tokens sampled by one weight version."""

    version: str | int | None = None


class SampledChoice(msgspec.Struct):
    """The part of a choice that sampling reads."""

    index: int
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None
    weight_version: str | int | None = None


class Sampled(msgspec.Struct):
    """The part of a reply that sampling reads."""

    choices: list[SampledChoice]
    weight_version: str | int | None = None


_DECODER = msgspec.json.Decoder(Sampled)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What a sampling request asked for.

    Attributes:
        prompt: int32 [P].
        n: Completions.
        params: What was sent.
        k: Width of the sampler's list; 0 for none.
        vocab_size: Ids at or above it are refused; None when unknown.
        exact: False when the served logprobs are not those of the distribution that was sampled from. ``Rollout.logp``
            is then NaN (unknown), never the logprob of another distribution.
    """

    prompt: Int32
    n: int
    params: SamplingParams
    k: int
    vocab_size: int | None
    exact: bool


def read_rollouts(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """The n rollouts of a reply, in the order of their index.

    Raises:
        ResponseError, AlignmentError: the reply cannot be trusted.
        ServerBusyError: the server aborted a generation (it is being paused or drained).
    """
    reply = typed(body, _DECODER)
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(asked.n)):
        raise ResponseError(
            "wrong choices", got=f"indexes {[c.index for c in choices][:8]}", expected=f"0..{asked.n - 1}, each once"
        )
    return [_rollout(choice, reply, asked) for choice in choices]


def _rollout(choice: SampledChoice, reply: Sampled, asked: SampleRequest) -> Rollout:
    where = f"choice {choice.index}"
    if choice.finish_reason == "abort":
        raise ServerBusyError("the server aborted the generation", where=where, hint="was it paused for new weights?")
    if choice.finish_reason not in {"stop", "length"}:
        raise ResponseError("unknown finish_reason", where=where, got=choice.finish_reason, expected="stop or length")
    if choice.token_ids is None or choice.logprobs is None:
        missing = "token_ids" if choice.token_ids is None else "logprobs"
        raise ResponseError(
            f"the reply has no {missing}",
            where=where,
            hint="the server ignored the field: it is too old to sample from",
        )
    ids = as_ids(choice.token_ids, where)
    if asked.vocab_size is not None and ids.size and int(ids.max()) >= asked.vocab_size:
        raise ResponseError(
            "id outside the vocabulary", where=where, got=int(ids.max()), expected=f"below {asked.vocab_size}"
        )
    if not 1 <= ids.size <= asked.params.max_tokens:
        raise ResponseError(
            "wrong number of tokens", where=where, got=ids.size, expected=f"1..{asked.params.max_tokens}"
        )
    logp = _sampled_logp(choice.logprobs, ids, where)
    return Rollout(
        prompt_ids=asked.prompt,
        completion_ids=ids,
        logp=(logp if asked.exact else np.full(ids.size, np.nan)).astype(np.float32),
        finish_reason=cast("FinishReason", choice.finish_reason),
        sampling=asked.params,
        topk=_topk(choice.logprobs, ids, logp, asked, where) if asked.k else None,
        version=_version(choice, reply),
    )


def _sampled_logp(logprobs: Logprobs, ids: Int32, where: str) -> Float64:
    served = logprobs.token_logprobs
    if len(served) != ids.size or (logprobs.tokens and len(logprobs.tokens) != ids.size):
        raise AlignmentError(
            "logprobs do not match the tokens", where=where, got=f"{len(served)} logprobs", expected=ids.size
        )
    for position, (name, token) in enumerate(zip(logprobs.tokens, ids.tolist(), strict=False)):
        if name.startswith(_PREFIX) and name != f"{_PREFIX}{token}":
            raise AlignmentError(
                "logprobs are of another token",
                where=f"{where}, token {position}",
                got=name,
                expected=f"{_PREFIX}{token}",
            )
    logp = np.array([np.nan if value is None else value for value in served], dtype=np.float64)
    bad = np.isnan(logp) | (logp <= LOWEST) | (logp > 1e-3)
    if bad.any():
        position = int(np.argmax(bad))
        raise ResponseError(
            "a sampled token's logprob cannot be one",
            where=f"{where}, token {position}",
            got=served[position],
            expected="a finite number <= 0",
        )
    return logp


def _topk(logprobs: Logprobs, ids: Int32, logp: Float64, asked: SampleRequest, where: str) -> TopK:
    lists = logprobs.top_logprobs
    if lists is None or len(lists) != ids.size:
        raise AlignmentError(
            "top_logprobs do not match the tokens",
            where=where,
            got=None if lists is None else len(lists),
            expected=ids.size,
        )
    try:
        rows = [
            {int(name.removeprefix(_PREFIX)): Logprob(_value(value)) for name, value in (row or {}).items()}
            for row in lists
        ]
    except ValueError as error:
        raise ResponseError(
            "top_logprobs are not named by token id",
            where=where,
            got=str(error),
            hint="return_tokens_as_token_ids was ignored",
        ) from error
    source = np.concatenate([asked.prompt, ids])
    entries: Entries = entries_of(rows, ids.tolist())
    topk, _ = build_scores(entries, source, asked.prompt.size - 1, asked.k, asked.vocab_size)
    if ids.size and not np.allclose(topk.actual_logp, logp, atol=1e-3):
        raise AlignmentError("top_logprobs and token_logprobs disagree about the sampled token", where=where)
    return topk


def _value(value: float | None) -> float:
    return float("nan") if value is None else value


def _version(choice: SampledChoice, reply: Sampled) -> str:
    """The version, "7+8" when the weights changed in mid-completion, "" when the server does not say."""
    if choice.weight_versions:
        return versions(choice.weight_versions)
    version = choice.weight_version if choice.weight_version is not None else reply.weight_version
    return "" if version is None else str(version)


def versions(spans: list[Span] | None) -> str:
    """The versions of a completion's tokens in their order, joined by "+"; "" when none is named."""
    return "+".join(dict.fromkeys(str(span.version) for span in spans or () if span.version is not None))


def sent(params: SamplingParams, seed: int) -> SamplingParams:
    """The parameters with the seed that goes over the wire."""
    return replace(params, seed=seed)
