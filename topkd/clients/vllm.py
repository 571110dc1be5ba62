"""vLLM's ``/v1/completions``: scores prompts with ``prompt_logprobs``, samples with ``logprobs``.

Token ids in, ids out. Spoken by vLLM (0.11 and later) and by ``topkd serve``.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import SecretStr

from topkd.clients.checks import check_vocabulary, request_ids
from topkd.clients.config import ClientConfig
from topkd.clients.decode import score_reply
from topkd.clients.dialect import HttpClient
from topkd.clients.limits import Budget
from topkd.clients.metrics import Metrics
from topkd.clients.refusals import repeats
from topkd.clients.retry import Try
from topkd.clients.sampled import Asked, rollouts, sent
from topkd.clients.transport import Transport
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
_ROUTE = "/v1/completions"


def score_body(model: str, ids: Int32, k: int) -> dict[str, Any]:
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


def sample_body(model: str, prompt: Int32, n: int, params: SamplingParams, k: int) -> dict[str, Any]:
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


class VllmCompletions(HttpClient):
    """Teacher and sampler over ``/v1/completions``.

    >>> async with VllmCompletions("http://127.0.0.1:8000") as teacher:          # doctest: +SKIP
    ...     rows = await teacher.score(ids, start=prompt_len - 1, k=20)

    Args:
        base_url: ``http(s)://host:port``.
        model: Served name; None takes the only one the server has.
        api_key: ``"env:NAME"``, ``"file:PATH"``, a key, or None.
        config: Time-outs, retries and bounds.
        vocab_size: Ids outside it are refused, in requests and replies.
        logprobs_mode: How the server was started. ``raw_logprobs`` (its default) are those of the untempered,
            untruncated policy; under inexact sampling parameters ``Rollout.logp`` is then NaN, for unknown.
        budget: Shared with other clients.
        metrics: Shared likewise.
        transport: In place of httpx.
    """

    dialect = "vllm"

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | SecretStr | None = None,
        config: ClientConfig | None = None,
        vocab_size: int | None = None,
        logprobs_mode: LogprobsMode = "raw_logprobs",
        budget: Budget | None = None,
        metrics: Metrics | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(
            base_url, model=model, api_key=api_key, config=config, budget=budget, metrics=metrics, transport=transport
        )
        self.vocab_size = vocab_size
        self.logprobs_mode = logprobs_mode

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Rows ``start .. len(ids) - 2`` with the K most probable tokens and the exact realised logprob of each."""
        array = request_ids(ids, start, k, self.vocab_size)
        model = await self.model_name()

        def build(one: Try) -> dict[str, Any]:
            # The same broken cache entry gives the same NaN again: the one retry asks for another.
            return score_body(model, array, k) | _salt(one)

        topk, zeros, fast = await self.endpoint.call(
            "POST",
            _ROUTE,
            build,
            decode=partial(score_reply, ids=array, start=start, k=k, vocab_size=self.vocab_size),
            where=self.where(f"{array.size} tokens, K = {k}"),
            tokens=int(array.size),
            entries=int(array.size) * (k + 1),
            k=k,
            model=model,
            response_retries=self.endpoint.config.response_retries,
        )
        self._note(topk, zeros)
        self.metrics_.add("decoded_fast" if fast else "decoded_typed")
        return topk

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """n completions with the exact logprobs they were sampled with, the stop token kept.

        A request without a seed gets one: a retry then draws the same completions, and what a lost reply held has no
        influence on what is kept. ``Rollout.sampling`` records the seed that was sent.
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
        result = await self.endpoint.call(
            "POST",
            _ROUTE,
            lambda one: sample_body(model, prompt, n, params, k) | _salt(one),
            decode=partial(rollouts, asked=Asked(prompt, n, params, k, self.vocab_size, exact)),
            where=self.where(f"{n} x {params.max_tokens} tokens"),
            tokens=int(prompt.size) + params.max_tokens,
            entries=n * params.max_tokens * (k + 2) + int(prompt.size),
            k=k,
            model=model,
        )
        self.metrics_.add("sampled_requests")
        self.metrics_.add("sampled_tokens", sum(rollout.completion_ids.size for rollout in result))
        if not exact:
            self.metrics_.add("inexact_rollouts", n)
        return result


def _salt(one: Try) -> dict[str, str]:
    return {"cache_salt": f"retry-{one.number}"} if one.failure is not None and repeats(one.failure) else {}
