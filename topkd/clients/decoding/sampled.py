"""Sampling requests, and replies to ``Rollout``: ids, exact logprobs, the sampler's own list. Pure.

Replies of ``/inference/v1/generate`` come in three shapes. Before 0.32 an entry names its token ``"token_id:N"``; from
0.32 on it has an integer ``token_id`` and a rank. Until 0.32 a list is cut to the K asked for *including* the sampled
token, which comes first; from 0.33 on it is whole. Each list is cut to its k best and the sampled token, which is the
form of ``/v1/completions``.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec
import numpy as np

from topkd.clients.decoding.checks import LOWEST, build_scores, check_reply_vocabulary, check_vocabulary
from topkd.clients.decoding.vllm import Logprob, as_ids, entries_of, refuse_abort, typed
from topkd.topk.errors import AlignmentError, ConfigError, ResponseError
from topkd.topk.protocols import Ids
from topkd.topk.samples import FinishReason, Rollout, SamplingParams
from topkd.topk.types import Float32, Float64, Int32, TopK

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


def prepare_sample_request(
    prompt_ids: Ids, n: int, params: SamplingParams, k: int, vocab_size: int | None = None
) -> SampleRequest:
    """Check a sampling request, and draw its seed where it has none.

    With a seed a retry draws the same completions: what a lost reply held has no influence on what is kept.
    """
    prompt = np.asarray(prompt_ids)
    if prompt.ndim != 1 or prompt.size < 1 or prompt.dtype.kind not in "iu":
        raise ConfigError(
            "a prompt must be a flat, non-empty sequence of token ids", got=f"{prompt.dtype} {prompt.shape}"
        )
    if n < 1 or k < 0:
        raise ConfigError("n must be at least 1 and k at least 0", got=f"n = {n}, k = {k}")
    check_vocabulary(prompt, vocab_size)
    return SampleRequest(prompt.astype(np.int32), n, draw_seed(params), k, vocab_size, params.exact)


def draw_seed(params: SamplingParams) -> SamplingParams:
    """Return the parameters with a seed: their own, or a random one."""
    return params if params.seed is not None else replace(params, seed=secrets.randbelow(2**31))


def build_vllm_sampling(n: int, params: SamplingParams, k: int) -> dict[str, Any]:
    """Build vLLM's sampling parameters, every one stated: no ``generation_config`` of the model's can leak in."""
    return {
        "n": n,
        "max_tokens": params.max_tokens,
        "min_tokens": 0,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": bool(params.stop_token_ids),  # else a generation_config adds ends of its own
        "seed": params.seed,
        "logprobs": k,
    }


def check_finish_reason(reason: str | None, where: str = "") -> FinishReason:
    """Return why a completion ended; refuse anything but an end token and the length."""
    refuse_abort(reason, where)
    if reason not in {"stop", "length"}:
        raise ResponseError("unknown finish_reason", where=where, got=reason, expected="stop or length")
    return cast("FinishReason", reason)


def check_completion_ids(ids: Int32, asked: SampleRequest, where: str = "") -> Int32:
    """Refuse a completion that is empty, longer than asked for, or has ids outside the vocabulary."""
    if not 1 <= ids.size <= asked.params.max_tokens:
        expected = f"1..{asked.params.max_tokens}"
        raise ResponseError(
            "the completion has the wrong number of tokens", where=where, got=ids.size, expected=expected
        )
    check_reply_vocabulary(ids, asked.vocab_size, where)
    return ids


def build_rollout(
    asked: SampleRequest,
    ids: Int32,
    logp: Float64 | Float32,
    finish_reason: FinishReason,
    *,
    topk: TopK | None,
    version: str = "",
) -> Rollout:
    """Build the rollout of a checked completion; logprobs of another distribution than the sampled one become NaN."""
    return Rollout(
        prompt_ids=asked.prompt,
        completion_ids=ids,
        logp=(logp if asked.exact else np.full(ids.size, np.nan)).astype(np.float32),
        finish_reason=finish_reason,
        sampling=asked.params,
        topk=topk if asked.k else None,
        version=version,
    )


def read_sampled_rollouts(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """Read the n rollouts of a ``/v1/completions`` reply, in the order of their index.

    Raises:
        ResponseError, AlignmentError: the reply cannot be trusted.
        ServerPausedError: the server aborted a generation (it is being paused or drained).
    """
    return _rollouts(typed(body, _DECODER), asked)


def _rollouts(reply: Sampled, asked: SampleRequest) -> list[Rollout]:
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(asked.n)):
        raise ResponseError(
            "wrong choices", got=f"indexes {[c.index for c in choices][:8]}", expected=f"0..{asked.n - 1}, each once"
        )
    return [_rollout(choice, reply, asked) for choice in choices]


def _rollout(choice: SampledChoice, reply: Sampled, asked: SampleRequest) -> Rollout:
    where = f"choice {choice.index}"
    finish_reason = check_finish_reason(choice.finish_reason, where)
    if choice.token_ids is None or choice.logprobs is None:
        missing, option = ("token_ids", "return_token_ids") if choice.token_ids is None else ("logprobs", "logprobs")
        raise ResponseError(
            f"the reply has no {missing}",
            where=where,
            hint=f"the server ignored the request's {option}: its version is too old to sample from",
        )
    ids = check_completion_ids(as_ids(choice.token_ids, where), asked, where)
    logp = _sampled_logp(choice.logprobs, ids, where)
    topk = _topk(choice.logprobs, ids, logp, asked, where) if asked.k else None
    return build_rollout(asked, ids, logp, finish_reason, topk=topk, version=_version(choice, reply))


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
            "the logprob of a sampled token is invalid",
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
    topk, _ = build_scores(entries_of(rows, ids.tolist()), source, asked.prompt.size - 1, asked.k, asked.vocab_size)
    if ids.size and not np.allclose(topk.actual_logp, logp, atol=1e-3):
        raise AlignmentError("top_logprobs and token_logprobs disagree about the sampled token", where=where)
    return topk


def _value(value: float | None) -> float:
    return float("nan") if value is None else value


def _version(choice: SampledChoice, reply: Sampled) -> str:
    """Read the version: "7+8" when the weights changed in mid-completion, "" when the server does not say."""
    if choice.weight_versions:
        return join_versions(choice.weight_versions)
    version = choice.weight_version if choice.weight_version is not None else reply.weight_version
    return "" if version is None else str(version)


def join_versions(spans: list[Span] | None) -> str:
    """Join a completion's distinct weight versions with "+", in order of appearance; "" if the server names none."""
    return "+".join(dict.fromkeys(str(span.version) for span in spans or () if span.version is not None))


class _Entry(msgspec.Struct):
    logprob: float | None
    token_id: int | None = None
    token: str | None = None
    rank: int | None = None

    def id(self) -> int:
        """Read the token id, however it is written."""
        if self.token_id is not None:
            return self.token_id
        if self.token is not None and self.token.startswith(_PREFIX) and self.token[len(_PREFIX) :].isdecimal():
            return int(self.token[len(_PREFIX) :])
        raise ResponseError("a sampled entry has no token id", got=self.token, expected="token_id, or 'token_id:N'")


class _Position(_Entry):
    top_logprobs: list[_Entry] = []


class _GeneratedLogprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _GeneratedChoice(msgspec.Struct):
    index: int
    token_ids: list[int] | None = None
    logprobs: _GeneratedLogprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None


class _Generated(msgspec.Struct):
    choices: list[_GeneratedChoice]


_GENERATED = msgspec.json.Decoder(_Generated)


def read_generate_rollouts(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """Read the n rollouts of an ``/inference/v1/generate`` reply; errors as ``read_sampled_rollouts``."""
    return _rollouts(Sampled([_convert_choice(choice, asked.k) for choice in typed(body, _GENERATED).choices]), asked)


def _convert_choice(choice: _GeneratedChoice, k: int) -> SampledChoice:
    content = choice.logprobs.content if choice.logprobs else None
    logprobs = None
    if content is not None:
        logprobs = Logprobs(
            token_logprobs=[entry.logprob for entry in content],
            tokens=[f"{_PREFIX}{entry.id()}" for entry in content],
            top_logprobs=[_cut_list(entry, k, place, choice.index) for place, entry in enumerate(content)],
        )
    return SampledChoice(
        index=choice.index,
        token_ids=choice.token_ids,
        logprobs=logprobs,
        finish_reason=choice.finish_reason,
        weight_versions=choice.weight_versions,
    )


def _cut_list(position: _Position, k: int, place: int, index: int) -> dict[str, float | None]:
    if k == 0:
        return {}
    best: dict[int, _Entry] = {}
    for entry in position.top_logprobs:
        if entry.logprob is None:
            raise ResponseError("a listed logprob is null", where=f"choice {index}, token {place}")
        best.setdefault(entry.id(), entry)
    top = sorted(best.items(), key=lambda item: -(item[1].logprob or 0.0))[:k]
    ranks = sorted(entry.rank for _, entry in top if entry.rank is not None)
    # Equal logprobs share a rank in some kernels, so a rank above its place is what shows a gap.
    if any(rank > at for at, rank in enumerate(ranks, start=1)):
        raise ResponseError(
            "a top-K entry is missing", where=f"choice {index}, token {place}", got=f"ranks {ranks[-3:]}", expected=k
        )
    listed = {f"{_PREFIX}{token}": entry.logprob for token, entry in top}
    return listed | {f"{_PREFIX}{position.id()}": position.logprob}
