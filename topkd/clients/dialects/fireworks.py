"""Fireworks' ``/v1/completions`` with ``echo``: scores given ids with K <= 5, samples with ids.

Written from the provider's SDK types; no reply of the service was recorded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import numpy as np

from topkd.clients.decoding.checks import (
    check_reply_rows,
    check_reply_vocabulary,
    check_request_ids,
    topk_with_actual,
)
from topkd.clients.decoding.sampled import (
    SampleRequest,
    build_rollout,
    check_completion_ids,
    check_finish_reason,
    prepare_sample_request,
)
from topkd.clients.decoding.vllm import as_ids, typed
from topkd.clients.dialects.base import ScoringClient, ServerFacts, ServerInfo
from topkd.topk.errors import AlignmentError, ConfigError, ResponseError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float64, Int32, TopK

ROUTE = "/v1/completions"


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
    """Build a request that echoes the last R tokens with their logprobs; by default a long prompt would be cut."""
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
    """Build a sampling request with every parameter stated that the service knows; it refuses others."""
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
    """Read checked rows. A full echo begins with an unconditional row for token 0, which predicts nothing of ours."""
    actual = ids[start + 1 :]
    [(_, content)] = _read_choices(body, 1)
    if len(content) == ids.size:
        content = content[start + 1 :]
    check_reply_rows(len(content), int(actual.size))
    got = as_ids([position.token_id for position in content], "echo")
    if (got != actual).any():
        row = int(np.argmax(got != actual))
        raise AlignmentError("the echo is of another token", where=f"row {row}", got=got[row], expected=actual[row])
    return _rows(content, start=start, k=k, actual=actual, vocab_size=vocab_size)


def read_fireworks_rollouts(body: bytes, *, asked: SampleRequest) -> list[Rollout]:
    """Read the n rollouts of a reply, in the order of their index."""
    rollouts = []
    for choice, content in _read_choices(body, asked.n):
        where = f"choice {choice.index}"
        finish_reason = check_finish_reason(choice.finish_reason, where)
        ids = check_completion_ids(as_ids([position.token_id for position in content], where), asked, where)
        start = int(asked.prompt.size) - 1
        topk = _rows(content, start=start, k=asked.k, actual=ids, vocab_size=asked.vocab_size)
        rollouts.append(build_rollout(asked, ids, topk.actual_logp, finish_reason, topk=topk))
    return rollouts


def _read_choices(body: bytes, n: int) -> list[tuple[_Choice, list[_Position]]]:
    """Read the choices of a reply in the order of their index, each with its tokens."""
    choices = sorted(typed(body, _DECODER).choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(n)):
        raise ResponseError("wrong choices", got=[choice.index for choice in choices][:8], expected=f"0..{n - 1}")
    if any(choice.logprobs is None or choice.logprobs.content is None for choice in choices):
        raise ResponseError("the reply has no logprobs.content", hint="the model serves no logprobs on this route")
    return [(choice, choice.logprobs.content or []) for choice in choices if choice.logprobs is not None]


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
    check_reply_vocabulary(ids, vocab_size)
    return topk_with_actual(ids, logp, start=start, k=k, actual_ids=actual, actual_logp=actual_logp)


class FireworksEcho(ScoringClient):
    """Teacher (K <= 5) and sampler over Fireworks' completions; ``base_url`` as in ``https://api.fireworks.ai/inference``.

    Args:
        base_url: Address, without ``/v1``.
        **options: Those of every client: see ``ClientOptions``.
    """

    dialect = "fireworks"

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """Recognise a host of fireworks.ai: nothing else tells the service from other OpenAI-compatible ones."""
        return server.host == "fireworks.ai" or server.host.endswith(".fireworks.ai")

    async def server_info(self) -> ServerInfo:
        """Return the declared model: the service lists a catalogue, not what one may call."""
        return ServerInfo(await self.model_name(), None, "")

    async def model_name(self) -> str:
        """Return the given name; there is no single model to fall back on."""
        if self._model is None:
            raise ConfigError("Fireworks needs a model name", where=self.endpoint.url, hint="model=accounts/...")
        return self._model

    async def healthy(self) -> bool:
        """Check that the service answers at all: it has no route for it."""
        return await self.endpoint.answers()

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``, for K <= 5."""
        self._check_k(k)
        array = check_request_ids(ids, start, k, self.vocab_size)
        body = build_fireworks_score(await self.model_name(), array, start, k)
        decode = partial(read_fireworks_scores, ids=array, start=start, k=k, vocab_size=self.vocab_size)
        topk = await self._ask_scores(ROUTE, body, decode, ids=array, k=k)
        self._count_scores(topk)
        return topk

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw n completions with exact logprobs (NaN under inexact parameters); their version is unknown ("")."""
        self._check_k(k)
        asked = prepare_sample_request(prompt_ids, n, params, k, self.vocab_size)
        if params.stop_token_ids:
            raise ConfigError("Fireworks takes no stop_token_ids", where=self.where(), got=params.stop_token_ids)
        body = build_fireworks_sample(await self.model_name(), asked.prompt, n, asked.params, k)
        result = await self._ask_rollouts(ROUTE, body, partial(read_fireworks_rollouts, asked=asked), asked)
        self._count_rollouts(result, asked)
        return result
