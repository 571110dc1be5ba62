"""Fireworks' ``/v1/completions`` with ``echo``: scores given ids with K <= 5, samples with ids.

Written from the provider's SDK types; no reply of the service was recorded.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any, cast

import msgspec
import numpy as np

from topkd.clients.decoding.checks import check_reply_rows, check_request_ids, check_vocabulary
from topkd.clients.decoding.listed import topk_with_actual
from topkd.clients.decoding.sampled import SampleRequest, sent
from topkd.clients.decoding.vllm_typed import as_ids, typed
from topkd.clients.dialects.base import ScoringClient, ServerInfo
from topkd.clients.dialects.raw_requests import ServerFacts
from topkd.clients.http.endpoint import RequestInfo
from topkd.topk.errors import AlignmentError, ConfigError, KLimitError, ResponseError
from topkd.topk.protocols import Ids
from topkd.topk.samples import FinishReason, Rollout, SamplingParams
from topkd.topk.types import Float64, Int32, TopK

ROUTE = "/v1/completions"
MAX_K = 5


class _Top(msgspec.Struct):
    token_id: int
    logprob: float


class _Position(msgspec.Struct):
    token_id: int
    logprob: float | None = None
    top_logprobs: list[_Top] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Reply)


def build_fireworks_score(model: str, ids: Int32, start: int, k: int) -> dict[str, Any]:
    """A request that echoes the last R tokens with their logprobs; the default would silently cut a long prompt."""
    return {
        "model": model,
        "prompt": ids.tolist(),
        "max_tokens": 0,
        "echo": True,
        "echo_last": int(ids.size) - 1 - start,
        "logprobs": True,
        "top_logprobs": k,
        "temperature": 1.0,
        "context_length_exceeded_behavior": "error",
    }


def build_fireworks_sample(model: str, prompt: Int32, n: int, params: SamplingParams, k: int) -> dict[str, Any]:
    """A sampling request with every parameter said that the service knows; it refuses unknown ones."""
    return {
        "model": model,
        "prompt": prompt.tolist(),
        "n": n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": params.seed,
        "logprobs": True,
        "top_logprobs": k,
        "ignore_eos": False,
        "context_length_exceeded_behavior": "error",
    }


def read_fireworks_scores(body: bytes, *, ids: Int32, start: int, k: int, vocab_size: int | None = None) -> TopK:
    """Checked rows. A full echo begins with an unconditional row for token 0, which predicts nothing of ours."""
    actual = ids[start + 1 :]
    content = _content(body, 1)[0]
    if len(content) == ids.size:
        content = content[start + 1 :]
    check_reply_rows(len(content), int(actual.size))
    got = as_ids([position.token_id for position in content], "echo")
    if (got != actual).any():
        row = int(np.argmax(got != actual))
        raise AlignmentError("the echo is of another token", where=f"row {row}", got=got[row], expected=actual[row])
    return _rows(content, start=start, k=k, actual=actual, vocab_size=vocab_size)


def sample_reply(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """The n rollouts of a reply, in the order of their index."""
    choices = sorted(typed(body, _DECODER).choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(asked.n)):
        raise ResponseError("wrong choices", got=[choice.index for choice in choices][:8], expected=f"0..{asked.n - 1}")
    rollouts = []
    for choice, content in zip(choices, _content(body, asked.n), strict=True):
        where = f"choice {choice.index}"
        if choice.finish_reason not in {"stop", "length"}:
            raise ResponseError("unknown finish_reason", where=where, got=choice.finish_reason)
        ids = as_ids([position.token_id for position in content], where)
        if not 1 <= ids.size <= asked.params.max_tokens:
            expected = f"1..{asked.params.max_tokens}"
            raise ResponseError("wrong number of tokens", where=where, got=ids.size, expected=expected)
        start = int(asked.prompt.size) - 1
        topk = _rows(content, start=start, k=asked.k, actual=ids, vocab_size=asked.vocab_size)
        rollouts.append(
            Rollout(
                prompt_ids=asked.prompt,
                completion_ids=ids,
                logp=topk.actual_logp if asked.exact else np.full(ids.size, np.nan, np.float32),
                finish_reason=cast("FinishReason", choice.finish_reason),
                sampling=asked.params,
                topk=topk if asked.k else None,
            )
        )
    return rollouts


def _content(body: bytes, n: int) -> list[list[_Position]]:
    choices = sorted(typed(body, _DECODER).choices, key=lambda choice: choice.index)
    if len(choices) != n:
        raise ResponseError("wrong number of choices", got=len(choices), expected=n)
    if any(choice.logprobs is None or choice.logprobs.content is None for choice in choices):
        raise ResponseError("the reply has no logprobs.content", hint="the model serves no logprobs on this route")
    return [choice.logprobs.content or [] for choice in choices if choice.logprobs is not None]


def _rows(content: list[_Position], *, start: int, k: int, actual: Int32, vocab_size: int | None) -> TopK:
    actual_logp = np.array([np.nan if p.logprob is None else p.logprob for p in content], dtype=np.float64)
    if np.isnan(actual_logp).any():
        raise ResponseError("a realised token's logprob is null", where=f"row {int(np.argmax(np.isnan(actual_logp)))}")
    lists = [position.top_logprobs or [] for position in content]
    short = next((row for row, entries in enumerate(lists) if len(entries) != k), None)
    if short is not None:
        raise ResponseError("wrong number of entries", where=f"row {short}", got=len(lists[short]), expected=k)
    ids = as_ids([entry.token_id for entries in lists for entry in entries], "top_logprobs").reshape(len(lists), k)
    logp: Float64 = np.array([e.logprob for entries in lists for e in entries], dtype=np.float64).reshape(len(lists), k)
    check_vocabulary_of(ids, vocab_size)
    return topk_with_actual(ids, logp, start=start, k=k, actual_ids=actual, actual_logp=actual_logp)


def check_vocabulary_of(ids: Int32, vocab_size: int | None) -> None:
    """Refuses a reply whose ids the model cannot have."""
    if vocab_size is not None and ids.size and int(ids.max()) >= vocab_size:
        raise ResponseError("id outside the vocabulary", got=int(ids.max()), expected=f"below {vocab_size}")


class FireworksEcho(ScoringClient):
    """Teacher (K <= 5) and sampler over Fireworks' completions; ``base_url`` as in ``https://api.fireworks.ai/inference``.

    Args:
        base_url: Address, without ``/v1``.
        **options: Those of every client: see ``ClientOptions``.
    """

    dialect = "fireworks"

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """A host of fireworks.ai: nothing else tells the service from other OpenAI-compatible ones."""
        return server.host == "fireworks.ai" or server.host.endswith(".fireworks.ai")

    async def server_info(self) -> ServerInfo:
        """The declared model: the service lists a catalogue, not what one may call."""
        return ServerInfo(await self.model_name(), None, "")

    async def model_name(self) -> str:
        """The given name; there is no single model to fall back on."""
        if self._model is None:
            raise ConfigError("Fireworks needs a model name", where=self.endpoint.url, hint="model=accounts/...")
        return self._model

    async def healthy(self) -> bool:
        """Whether the service answers at all: it has no route for it."""
        return await self.endpoint.answers()

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """As ``TeacherScorer``, for K <= 5."""
        _limit(k, self.where())
        array = check_request_ids(ids, start, k, self.vocab_size)
        model = await self.model_name()
        topk = await self.endpoint.call(
            "POST",
            ROUTE,
            build_fireworks_score(model, array, start, k),
            decode=partial(read_fireworks_scores, ids=array, start=start, k=k, vocab_size=self.vocab_size),
            where=self.where(f"{array.size} tokens, K = {k}"),
            asks=RequestInfo(tokens=int(array.size), entries=int(array.size) * (k + 1), k=k, model=model),
            response_retries=self.endpoint.config.response_retries,
        )
        self._note(topk, 0)
        return topk

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """n completions with exact logprobs (NaN under inexact sampling parameters); their version is unknown ("")."""
        _limit(k, self.where())
        prompt = np.asarray(prompt_ids)
        if prompt.ndim != 1 or prompt.size < 1 or prompt.dtype.kind not in "iu" or n < 1:
            raise ConfigError("a prompt must be a flat, non-empty sequence of token ids, and n at least 1")
        if params.stop_token_ids:
            raise ConfigError("Fireworks takes no stop_token_ids", where=self.where(), got=params.stop_token_ids)
        check_vocabulary(prompt, self.vocab_size)
        prompt = prompt.astype(np.int32)
        model = await self.model_name()
        params = params if params.seed is not None else sent(params, secrets.randbelow(2**31))
        return await self.endpoint.call(
            "POST",
            ROUTE,
            build_fireworks_sample(model, prompt, n, params, k),
            decode=partial(sample_reply, asked=SampleRequest(prompt, n, params, k, self.vocab_size, params.exact)),
            where=self.where(f"{n} x {params.max_tokens} tokens"),
            asks=RequestInfo(
                tokens=int(prompt.size) + params.max_tokens, entries=n * params.max_tokens * (k + 1), k=k, model=model
            ),
        )


def _limit(k: int, where: str) -> None:
    if k > MAX_K:
        error = KLimitError(f"K = {k} is above Fireworks' limit", where=where, expected=f"K <= {MAX_K}")
        error.limit = MAX_K
        raise error
    if k < 0:
        raise ConfigError("k must be at least 0", got=k)
