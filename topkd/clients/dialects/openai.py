"""OpenAI-compatible chat: samples only. Token ids are recovered from bytes by the declared tokenizer's own table.

Such servers cannot score a given sequence, so they cannot teach; what they draw can be trained on (``sft``), or looked
at. Spoken by OpenAI, Azure, OpenRouter, llama.cpp, Ollama and, in addition to their own routes, vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Unpack
from urllib.parse import urlsplit

from topkd.clients.decoding.byte_map import ByteMap, load_bytemap
from topkd.clients.decoding.openai import Recovered, read_chat_rollouts
from topkd.clients.decoding.sampled import SampleRequest, prepare_sample_request
from topkd.clients.dialects.base import ClientOptions, HttpClient, ServerFacts
from topkd.clients.dialects.records import find_dialect
from topkd.topk.errors import ConfigError, ResponseError, UnsupportedError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import TopK

ROUTE = "/v1/chat/completions"
Message = Mapping[str, str]
_STRICT = ("openai.com", "azure.com", "openrouter.ai")  # refuse, or pass on, fields they do not know


def build_chat(
    model: str, messages: Sequence[Message], n: int, params: SamplingParams, k: int, *, strict: bool
) -> dict[str, Any]:
    """Build a chat request with every parameter stated that the server knows.

    Args:
        model: Served name.
        messages: As they go over the wire.
        n: Completions.
        params: Sampling parameters.
        k: Width of the list; one more is asked for, because vLLM gives the sampled token one of the K places.
        strict: The server refuses fields outside OpenAI's own; others have defaults of theirs that must be overruled
            (llama.cpp truncates with top_k 40 and min_p 0.05 unless told otherwise).
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in messages],
        "n": n,
        "max_completion_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": params.seed,
        "logprobs": True,
        "top_logprobs": min(k + 1, find_dialect("openai").max_k) if k else 0,
    }
    if not strict:
        body |= {
            "max_tokens": params.max_tokens,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "repeat_penalty": params.repetition_penalty,
            "typical_p": 1.0,
            "stop_token_ids": list(params.stop_token_ids),
            "return_weight_versions": True,
        }
    return body


class OpenAIChat(HttpClient):
    """Sampler over ``/v1/chat/completions``.

    ``Rollout.version`` is what the reply says (vLLM 0.33 on, ``topkd serve``), else "" for unknown: hosted services say
    nothing about their weights.

    Args:
        base_url: ``http(s)://host:port``.
        tokenizer: The *served model's* tokenizer (folder, tokenizer.json, cached Hugging Face id, or a loaded map).
        **options: Those of every client: see ``ClientOptions``.
    """

    dialect = "openai"

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:  # noqa: ARG003
        """Take any server with ``/v1/models``: as far as can be known, it only samples."""
        return True

    def __init__(
        self, base_url: str, *, tokenizer: str | Path | ByteMap | None = None, **options: Unpack[ClientOptions]
    ) -> None:
        super().__init__(base_url, **options)
        self._table = load_bytemap(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        host = urlsplit(self.endpoint.url).hostname or ""
        self._strict = any(host == name or host.endswith(f".{name}") for name in _STRICT)

    async def score(self, ids: Ids, start: int, k: int) -> TopK:  # noqa: ARG002
        """Raise UnsupportedError: chat completions cannot score a given sequence."""
        self._cannot(f"score {len(ids)} given ids", "chat completions return logprobs of generated tokens only")

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:  # noqa: ARG002
        """Raise UnsupportedError: the server renders the prompt itself, from messages; see ``chat``."""
        self._cannot(f"continue {len(prompt_ids)} given ids", "chat completions take messages: use chat(messages, ...)")

    async def chat(
        self, messages: Sequence[Message], n: int, params: SamplingParams, *, prompt_ids: Ids, k: int = 0
    ) -> list[Rollout]:
        """Draw n answers to ``messages`` with exact logprobs, ids recovered from bytes.

        A list is cut before its first entry whose bytes name no single id, so that what it holds is still the top of
        the distribution (``metrics["ambiguous_entries"]``). A draw that contains such a token is left out
        (``metrics["ambiguous_rollouts"]``): fewer than n may come back. The end token is not in these replies.

        Args:
            messages: The conversation, as the server's chat template takes it.
            n: Answers.
            params: Exact ones (the defaults), or the rollouts' ``logp`` is NaN.
            prompt_ids: What the served template makes of ``messages``; the server's own count must agree.
            k: Width of the sampler's list, at most 20.

        Raises:
            KLimitError: k above 20.
            AlignmentError: the server counts another number of prompt tokens.
            ResponseError: no draw could be read back as ids.
        """
        self._check_k(k)
        asked = prepare_sample_request(prompt_ids, n, params, k)
        params = asked.params
        if self._strict and (params.top_k or params.min_p or params.repetition_penalty != 1.0 or params.stop_token_ids):
            raise ConfigError(
                "this server knows no top_k, min_p, repetition_penalty or stop_token_ids", where=self.where()
            )
        asked = replace(asked, vocab_size=self._table.size if self._table else None)
        body = build_chat(await self.model_name(), messages, n, params, k, strict=self._strict)
        decode = partial(read_chat_rollouts, asked=asked, table=self._table)
        recovered = await self._ask_rollouts(ROUTE, body, decode, asked)
        return self._take(recovered, asked)

    def _take(self, recovered: Recovered, asked: SampleRequest) -> list[Rollout]:
        """Count what a reply held, and refuse one of which no draw could be read."""
        self._count_rollouts(recovered.rollouts, asked)
        self.metrics_.add("ambiguous_entries", recovered.ambiguous_entries)
        self.metrics_.add("ambiguous_rollouts", recovered.ambiguous_rollouts)
        self.metrics_.add("listed_entries", recovered.listed_entries)
        if not recovered.rollouts:
            raise ResponseError(
                "no draw could be read back as token ids",
                where=self.where(),
                got=f"{recovered.ambiguous_rollouts} draws with bytes that name no single id",
                hint="is the declared tokenizer the served model's?" if self._table else "give tokenizer=...",
            )
        return recovered.rollouts

    def _cannot(self, what: str, why: str) -> NoReturn:
        raise UnsupportedError(f"an OpenAI chat endpoint cannot {what}", where=self.where(), hint=why)
