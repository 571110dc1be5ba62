"""vLLM's ``/v1/completions``: scores prompts with ``prompt_logprobs``, samples with ``logprobs``.

Token ids in, ids out. Spoken by vLLM (0.11 and later) and by ``topkd serve``.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Unpack

import msgspec

from topkd.clients.decoding.checks import check_request_ids
from topkd.clients.decoding.sampled import build_vllm_sampling, prepare_sample_request, read_sampled_rollouts
from topkd.clients.decoding.vllm import read_vllm_scores, typed
from topkd.clients.dialects.base import ClientOptions, ScoringClient, ServerFacts
from topkd.clients.http.endpoint import RequestInfo
from topkd.clients.http.retry import Try
from topkd.clients.http.status_errors import is_repeating
from topkd.topk.errors import FinalServerError, ResponseError, TopkdError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Int32, TopK

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class _Weights(msgspec.Struct):
    weight_version: str | int | None = None


_WEIGHTS = msgspec.json.Decoder(_Weights)


def build_vllm_score(model: str, ids: Int32, k: int) -> dict[str, Any]:
    """Build a request that scores every position of ``ids``; the one token it must generate is thrown away."""
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
    """Build a sampling request with every parameter stated."""
    return build_vllm_sampling(n, params, k) | {
        "model": model,
        "prompt": prompt.tolist(),
        "stop": [],
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "return_weight_versions": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


def build_salt(attempt: Try) -> dict[str, str]:
    """Build the field that makes a retry miss the server's cache: a broken entry gives the same NaN again."""
    repeats = attempt.failure is not None and is_repeating(attempt.failure)
    return {"cache_salt": f"retry-{attempt.number}"} if repeats else {}


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
    route: ClassVar[str] = "/v1/completions"
    _build_score = staticmethod(build_vllm_score)
    _read_scores = staticmethod(read_vllm_scores)
    _build_sample = staticmethod(build_vllm_sample)
    _read_rollouts = staticmethod(read_sampled_rollouts)

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """Recognise a vLLM: it has ``/version``."""
        return bool(await server.version())

    def __init__(
        self, base_url: str, *, logprobs_mode: LogprobsMode = "raw_logprobs", **options: Unpack[ClientOptions]
    ) -> None:
        super().__init__(base_url, **options)
        self.logprobs_mode = logprobs_mode
        self._has_weight_info: bool | None = None  # whether /weight_info is worth asking; None before it was tried
        self._adapter: tuple[str, str] | None = None  # name and version, once it is known

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score rows ``start .. len(ids) - 2``: the K most probable tokens, and the exact realised logprob of each."""
        array = check_request_ids(ids, start, k, self.vocab_size)
        model = await self.model_name()
        topk, zeros, fast = await self._ask_scores(
            self.route,
            lambda attempt: self._build_score(model, array, k) | build_salt(attempt),
            partial(self._read_scores, ids=array, start=start, k=k, vocab_size=self.vocab_size),
            ids=array,
            k=k,
        )
        self._count_scores(topk, zeros)
        self.metrics_.add("decoded_fast" if fast else "decoded_typed")
        return topk

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw n completions with the exact logprobs they were sampled with, the stop token kept.

        ``Rollout.sampling`` records the seed that was sent. ``Rollout.version`` is what the reply states (vLLM 0.33
        on), else what ``/weight_info`` stated before and after; "" (unknown) where neither does: vLLM before 0.33
        outside development mode.
        """
        asked = prepare_sample_request(prompt_ids, n, params, k, self.vocab_size)
        if self.logprobs_mode == "processed_logprobs" and params.temperature > 0:
            asked = replace(asked, exact=True)
        model, width = await self.model_name(), await self._list_width(k)
        draw = self._ask_rollouts(
            self.route,
            lambda attempt: self._build_sample(model, asked.prompt, n, asked.params, width) | build_salt(attempt),
            partial(self._read_rollouts, asked=asked),
            asked,
            k=width,
        )
        result = await self._versioned(model, draw)
        self._count_rollouts(result, asked)
        return result

    async def _list_width(self, k: int) -> int:
        """Return the width of list to ask for, so that K entries come back."""
        return k

    async def _versioned(self, model: str, draw: Coroutine[None, None, list[Rollout]]) -> list[Rollout]:
        """Draw, and label each rollout with the weight version that drew it, from wherever the server states it."""
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
            self._has_weight_info = False  # replies say it themselves: no more questions
        elif before:
            after = await self._weight_version()
            # Equal before and after: what was drawn in between came from these weights.
            version = after if before == after else f"{before}+{after}"
            return [replace(rollout, version=version) for rollout in result]
        return result

    async def _adapter_version(self, model: str) -> str:
        """Read the version in the name of an adapter that a weight sink loaded (``base@version``); "" for others."""
        base, _, version = model.rpartition("@")
        if not base or not version:
            return ""
        if self._adapter is None or self._adapter[0] != model:
            parents = {card.id: card.parent for card in await self._cards()}
            self._adapter = model, version if parents.get(model) else ""
        return self._adapter[1]

    async def _weight_version(self) -> str:
        """Ask ``/weight_info``; "" where it is not mounted, or where replies hold the version anyway.

        vLLM before 0.33 leaves the version out of this route's replies; its development mode states it beside them.
        """
        if self._has_weight_info is False:
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
            self._has_weight_info = False
            return ""
        except TopkdError:  # unknown for this draw; a draw is not lost for want of its label
            return ""
        self._has_weight_info = True
        return "" if answer.weight_version is None else str(answer.weight_version)
