"""vLLM's ``/v1/completions``: scores prompts with ``prompt_logprobs``, samples with ``logprobs``.

Token ids in, ids out. Spoken by vLLM (0.11 and later) and by ``topkd serve``.
"""

from __future__ import annotations

import secrets
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import msgspec
import numpy as np

from topkd.clients.decoding.checks import check_request_ids, check_vocabulary
from topkd.clients.decoding.sampled import SampleRequest, read_rollouts, sent
from topkd.clients.decoding.vllm import read_vllm_scores
from topkd.clients.decoding.vllm_typed import typed
from topkd.clients.dialects.base import ClientOptions, ScoringClient
from topkd.clients.dialects.raw_requests import ServerFacts
from topkd.clients.http.endpoint import RequestInfo
from topkd.clients.http.retry import Try
from topkd.clients.http.status_errors import is_repeating
from topkd.topk.errors import ConfigError, FinalServerError, ResponseError, TopkdError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
_ROUTE = "/v1/completions"


class _Weights(msgspec.Struct):
    weight_version: str | int | None = None


_WEIGHTS = msgspec.json.Decoder(_Weights)


def build_vllm_score(model: str, ids: Int32, k: int) -> dict[str, Any]:
    """A request that scores every position of ``ids``; the one token it must generate is thrown away."""
    return {
        "model": model,
        "prompt": ids.tolist(),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
        "return_token_ids": True,
        "add_special_tokens": False,
    }


def build_vllm_sample(model: str, prompt: Int32, n: int, params: SamplingParams, k: int) -> dict[str, Any]:
    """A sampling request with every parameter said, so that no ``generation_config`` of the model's can leak in."""
    return {
        "model": model,
        "prompt": prompt.tolist(),
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
        "stop": [],
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": bool(params.stop_token_ids),  # else a generation_config adds ends of its own
        "seed": params.seed,
        "logprobs": k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "return_weight_versions": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


class VllmCompletions(ScoringClient):
    """Teacher and sampler over ``/v1/completions``.

    >>> async with VllmCompletions("http://127.0.0.1:8000") as teacher:          # doctest: +SKIP
    ...     rows = await teacher.score(ids, start=prompt_len - 1, k=20)

    Args:
        base_url: ``http(s)://host:port``.
        logprobs_mode: How the server was started. ``raw_logprobs`` (its default) are those of the untempered,
            untruncated policy; under inexact sampling parameters ``Rollout.logp`` is then NaN, for unknown.
        **options: Those of every client: see ``ClientOptions``.
    """

    dialect = "vllm"

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """A vLLM has ``/version``."""
        return bool(await server.version())

    def __init__(
        self, base_url: str, *, logprobs_mode: LogprobsMode = "raw_logprobs", **options: Unpack[ClientOptions]
    ) -> None:
        super().__init__(base_url, **options)
        self.logprobs_mode = logprobs_mode
        self._tells: bool | None = None  # whether /weight_info is worth asking; None before it was tried
        self._adapter: tuple[str, str] | None = None  # name and version, once it is known

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Rows ``start .. len(ids) - 2`` with the K most probable tokens and the exact realised logprob of each."""
        array = check_request_ids(ids, start, k, self.vocab_size)
        model = await self.model_name()

        def build(attempt: Try) -> dict[str, Any]:
            # The same broken cache entry gives the same NaN again: the one retry asks for another.
            return build_vllm_score(model, array, k) | _salt(attempt)

        topk, zeros, fast = await self.endpoint.call(
            "POST",
            _ROUTE,
            build,
            decode=partial(read_vllm_scores, ids=array, start=start, k=k, vocab_size=self.vocab_size),
            where=self.where(f"{array.size} tokens, K = {k}"),
            asks=RequestInfo(tokens=int(array.size), entries=int(array.size) * (k + 1), k=k, model=model),
            response_retries=self.endpoint.config.response_retries,
        )
        self._note(topk, zeros)
        self.metrics_.add("decoded_fast" if fast else "decoded_typed")
        return topk

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """n completions with the exact logprobs they were sampled with, the stop token kept.

        A request without a seed gets one: a retry then draws the same completions, and what a lost reply held has no
        influence on what is kept. ``Rollout.sampling`` records the seed that was sent. ``Rollout.version`` is what the
        reply says (vLLM 0.33 on), else what ``/weight_info`` said before and after; "" (unknown) where neither does:
        vLLM before 0.33 outside development mode.
        """
        prompt = np.asarray(prompt_ids)
        if prompt.ndim != 1 or prompt.size < 1 or prompt.dtype.kind not in "iu":
            raise ConfigError(
                "a prompt must be a flat, non-empty sequence of token ids", got=f"{prompt.dtype} {prompt.shape}"
            )
        if n < 1 or k < 0:
            raise ConfigError("n must be at least 1 and k at least 0", got=f"n = {n}, k = {k}")
        check_vocabulary(prompt, self.vocab_size)
        prompt = prompt.astype(np.int32)
        model = await self.model_name()
        params = params if params.seed is not None else sent(params, secrets.randbelow(2**31))
        processed = self.logprobs_mode == "processed_logprobs" and params.temperature > 0
        exact = params.exact or processed
        result = await self._versioned(
            model,
            self.endpoint.call(
                "POST",
                _ROUTE,
                lambda attempt: build_vllm_sample(model, prompt, n, params, k) | _salt(attempt),
                decode=partial(read_rollouts, asked=SampleRequest(prompt, n, params, k, self.vocab_size, exact)),
                where=self.where(f"{n} x {params.max_tokens} tokens"),
                asks=RequestInfo(
                    tokens=int(prompt.size) + params.max_tokens,
                    entries=n * params.max_tokens * (k + 2) + int(prompt.size),
                    k=k,
                    model=model,
                ),
            ),
        )
        self.metrics_.add("sampled_requests")
        self.metrics_.add("sampled_tokens", sum(rollout.completion_ids.size for rollout in result))
        if not exact:
            self.metrics_.add("inexact_rollouts", n)
        return result

    async def _versioned(self, model: str, draw: Coroutine[None, None, list[Rollout]]) -> list[Rollout]:
        """The rollouts, each with the weight version that drew it, from wherever the server tells it."""
        try:
            adapter = await self._adapter_version(model)
            before = "" if adapter else await self._weight_version()
        except BaseException:
            draw.close()
            raise
        result = await draw
        if adapter:  # a reply's own version is that of the weights underneath
            return [replace(rollout, version=adapter) for rollout in result]
        if any(rollout.version for rollout in result):
            self._tells = False  # replies say it themselves: no more questions
        elif before:
            after = await self._weight_version()
            # Equal before and after: what was drawn in between came from these weights.
            version = after if before == after else f"{before}+{after}"
            return [replace(rollout, version=version) for rollout in result]
        return result

    async def _adapter_version(self, model: str) -> str:
        """The version in the name of an adapter that a weight sink has loaded (``base@version``); "" for others."""
        base, _, version = model.rpartition("@")
        if not base or not version:
            return ""
        if self._adapter is None or self._adapter[0] != model:
            parents = {card.id: card.parent for card in await self._cards()}
            self._adapter = model, version if parents.get(model) else ""
        return self._adapter[1]

    async def _weight_version(self) -> str:
        """What ``/weight_info`` says; "" where it is not mounted, or where replies hold the version anyway.

        vLLM before 0.33 leaves the version out of this route's replies; its development mode tells it beside them.
        """
        if self._tells is False:
            return ""
        where = self.where("GET /weight_info")
        try:
            answer = await self.endpoint.call(
                "GET",
                "/weight_info",
                decode=lambda body: typed(body, _WEIGHTS),
                where=where,
                asks=RequestInfo(single_try=True),
            )
        except (FinalServerError, ResponseError):
            self._tells = False
            return ""
        except TopkdError:  # unknown for this draw; a draw is not lost for want of its label
            return ""
        self._tells = True
        return "" if answer.weight_version is None else str(answer.weight_version)


def _salt(attempt: Try) -> dict[str, str]:
    return (
        {"cache_salt": f"retry-{attempt.number}"}
        if attempt.failure is not None and is_repeating(attempt.failure)
        else {}
    )
