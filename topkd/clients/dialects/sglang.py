"""SGLang's ``/generate``: scores as flat base64 arrays, samples, and scores shared lists of candidates.

Met for real: SGLang 0.5.23 on CPU. Sampled logprobs follow the temperature there (scores never do), so a draw is exact
at temperature 1 only. A K above the vocabulary and an id outside it end the server's process: neither is ever sent.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, Unpack

import numpy as np

from topkd.clients.decoding.checks import check_request_ids, prepare_candidates
from topkd.clients.decoding.sampled import SampleRequest, prepare_sample_request
from topkd.clients.decoding.sglang import (
    is_last_id_hidden,
    read_sglang_candidates,
    read_sglang_rollouts,
    read_sglang_scores,
)
from topkd.clients.dialects.base import ClientOptions, ScoringClient, ServerFacts, ServerInfo, Wire
from topkd.topk.errors import AlignmentError, ConfigError, ModelNotFoundError, RequestRefusedError, UnsupportedError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

ROUTE = "/generate"
_CHECKS_IDS = (0, 5, 15)  # from this version on an id outside the vocabulary is refused in token_ids_logprob
_SAFE_K = 128  # where the vocabulary's size cannot be learnt: below that of any tokenizer
_NO_SUCH_ID = 2**31 - 1
_VALID_IDS = re.compile(r"valid range is \[0, (\d+)\)")
_UNION_CELLS = 4_000_000  # rows x distinct ids of one request: nested JSON of about 40 bytes each


@dataclass(frozen=True, slots=True)
class SglangFacts:
    """What an SGLang server states about itself; a field it does not state is None, empty or False.

    Attributes:
        version: Such as (0, 5, 23).
        text: The version as it is written.
        vocab_size: Ids at or above it, and a K above it, would end the server's process.
        max_input_tokens: The longest prompt that it takes.
        draws_by_seed: ``--enable-deterministic-inference``: a seed decides a draw, copies of one request are equal.
        name: What it was told to call its model; after a reload its list of models has the folder's path instead.
    """

    version: tuple[int, ...] = ()
    text: str = ""
    vocab_size: int | None = None
    max_input_tokens: int | None = None
    draws_by_seed: bool = False
    name: str = ""


def build_sglang_score(ids: Int32, start: int, k: int, *, adapter: str | None = None) -> dict[str, Any]:
    """Build a request that scores rows ``start ..``; nothing is generated. Entry 0 of the reply is null by design."""
    return {
        "input_ids": ids.tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": k,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
        "return_text_in_logprobs": False,
        **({} if adapter is None else {"lora_path": adapter}),
    }


def build_sglang_candidates(ids: Int32, start: int, candidates: Int32, *, adapter: str | None = None) -> dict[str, Any]:
    """Build a request that scores the same ``candidates`` at every row ``start ..``."""
    return build_sglang_score(ids, start, 0, adapter=adapter) | {"token_ids_logprob": candidates.tolist()}


def build_sglang_sample(
    prompt: Int32, params: SamplingParams, n: int, k: int, *, adapter: str | None = None
) -> dict[str, Any]:
    """Build a sampling request with every parameter stated; without a seed the server draws from its own state."""
    return {
        "input_ids": prompt.tolist(),
        "sampling_params": {
            "n": n,
            "max_new_tokens": params.max_tokens,
            "min_new_tokens": 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": False,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            **({} if params.seed is None else {"sampling_seed": params.seed}),
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
        **({} if adapter is None else {"lora_path": adapter}),
    }


class Sglang(ScoringClient):
    """Teacher, shared-list candidate scorer and sampler over ``/generate``.

    Args:
        base_url: ``http(s)://host:port``.
        **options: Those of every client: see ``ClientOptions``.
    """

    dialect = "sglang"

    def __init__(self, base_url: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(base_url, **options)
        self._facts: list[SglangFacts] = []  # learnt once, shared with the copies under other names
        self._adapter: str | None = None

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """Recognise an SGLang: it states its own version in ``/server_info``."""
        for route in ("/server_info", "/get_server_info"):
            info = await server.wire.get(route)
            if info is not None and ("sglang" in str(info.get("version", "")) or "tokenizer_path" in info):
                return True
        return await server.wire.mounted("/generate") and bool(await server.wire.get("/model_info"))

    def under(self, model: str) -> Self:
        """Copy the client under another name; ``/generate`` names no model, so an adapter is sent as ``lora_path``."""
        other = super().under(model)
        is_base = (model == self._model and self._adapter is None) or model in {facts.name for facts in self._facts}
        other._adapter = None if is_base else model  # noqa: SLF001 - our own copy
        return other

    async def server_info(self) -> ServerInfo:
        """Ask for the model, and take version and longest prompt as ``/server_info`` states them."""
        facts, name = await self.facts(), await self.model_name()
        cards = await self._cards()
        card = next((card for card in cards if card.id == name), None)
        if card is None and name not in {facts.name, self._adapter}:
            raise ModelNotFoundError(
                f"the server has no model {name!r}", where=self.endpoint.url,
                got=", ".join(card.id for card in cards) or "no model",
            )  # fmt: skip
        longest = facts.max_input_tokens or (card.max_model_len if card else None)
        return ServerInfo(name, longest, facts.text, tuple(card.id for card in cards))

    async def facts(self) -> SglangFacts:
        """Return what the server states about itself; asked once, before the first request that depends on it."""
        if not self._facts:
            self._facts.append(await self._ask_facts())
        return self._facts[0]

    async def _ask_facts(self) -> SglangFacts:
        wire = Wire(self)
        state = await wire.get("/server_info") or await wire.get("/get_server_info") or {}
        text = str(state.get("version") or "") or await self.server_version()
        version, longest = tuple(int(part) for part in re.findall(r"\d+", text)[:3]), state.get("max_req_input_len")
        if self._model is not None and self._adapter is None:
            adapters = {card.id for card in await self._cards() if card.parent is not None}
            self._adapter = self._model if self._model in adapters else None
        return SglangFacts(
            version,
            text,
            await self._ask_vocab_size(version),
            longest - 1 if isinstance(longest, int) and longest > 1 else None,
            bool(state.get("enable_deterministic_inference")),
            str(state.get("served_model_name") or ""),
        )

    async def _ask_vocab_size(self, version: tuple[int, ...]) -> int | None:
        """Learn the vocabulary's size from the refusal of an id that no vocabulary has; the server computes nothing."""
        if version < _CHECKS_IDS:  # older ones would run the request, and end
            return None
        try:
            await Wire(self).post(ROUTE, build_sglang_candidates(np.zeros(1, np.int32), 0, np.array([_NO_SUCH_ID])))
        except RequestRefusedError as error:
            found = _VALID_IDS.search(str(error))
            return int(found[1]) if found else None
        return None

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``: only the rows from ``start`` are sent, a cached prefix is used up to there."""
        vocab_size = await self._know_vocab_size()
        array = check_request_ids(ids, start, k, vocab_size)
        k = self._cut_k(k, vocab_size)
        last_id = None if vocab_size is None or vocab_size - 1 not in array[start:] else vocab_size - 1
        found = await self._score(array, start, k, vocab_size, last_id)
        if found is None:  # its vocabulary is not known: ask again, with the proof
            found = await self._score(array, start, k, vocab_size, int(array.max()))
        if found is None:
            raise AlignmentError(
                "the server shows token 0 in place of the prompt's largest id, also when asked for that id's logprob",
                where=self.where(),
            )
        topk, zeros, flat = found
        self._count_scores(topk, zeros)
        self.metrics_.add("decoded_flat" if flat else "decoded_nested")
        return topk

    async def _score(
        self, ids: Int32, start: int, k: int, vocab_size: int | None, last_id: int | None
    ) -> tuple[TopK, int, bool] | None:
        """Score once; None for a reply that shows 0 for the prompt's largest id, which may be the vocabulary's last."""
        body = build_sglang_score(ids, start, k, adapter=self._adapter)
        if last_id is not None:
            body["token_ids_logprob"] = [last_id]

        def decode(reply: bytes) -> tuple[TopK, int, bool] | None:
            try:
                return read_sglang_scores(reply, ids=ids, start=start, k=k, vocab_size=vocab_size, last_id=last_id)
            except AlignmentError:
                if vocab_size is None and last_id is None and is_last_id_hidden(reply, ids, start):
                    return None
                raise

        entries = (int(ids.size) - 1 - start) * (k + 1 + (last_id is not None))
        return await self._ask_scores(ROUTE, body, decode, ids=ids, k=k, entries=entries)

    async def _know_vocab_size(self) -> int | None:
        """Return the smaller of the vocabulary that was given and that of the server, where either is known."""
        known = [size for size in (self.vocab_size, (await self.facts()).vocab_size) if size is not None]
        return min(known, default=None)

    def _cut_k(self, k: int, vocab_size: int | None) -> int:
        """Return K cut to the vocabulary; refuse a large one where the vocabulary is not known."""
        if vocab_size is None and k > _SAFE_K:
            raise ConfigError(
                "K above the vocabulary would end this server, and it does not state its vocabulary",
                where=self.where(), got=f"K = {k}", expected=f"at most {_SAFE_K}",
                hint="give vocab_size, or use SGLang 0.5.15 or newer",
            )  # fmt: skip
        return k if vocab_size is None else min(k, vocab_size)

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Score ``candidates`` [R, K] (-1 pads give -inf), through one list that all rows share.

        Raises:
            UnsupportedError: rows times distinct candidates is more than one reply should hold.
        """
        vocab_size = await self._know_vocab_size()
        array = check_request_ids(ids, start, 0, vocab_size)
        rows = int(array.size) - 1 - start
        wanted = prepare_candidates(candidates, rows, vocab_size)
        union = np.unique(wanted[wanted >= 0]).astype(np.int32)
        if not union.size:
            return np.full(wanted.shape, -np.inf, dtype=np.float32)
        # Scored beside the candidates where the prompt holds it: the server shows it as 0. Unknown, it is the largest.
        largest = int(array.max()) if vocab_size is None else vocab_size - 1
        last_id = largest if largest > 0 and largest in array[start:] else None
        if last_id is not None:
            union = np.union1d(union, [last_id]).astype(np.int32)
        if rows * union.size > _UNION_CELLS:
            raise UnsupportedError(
                "SGLang takes one list of candidates for all rows, and these rows share too few",
                where=self.where(),
                got=f"{rows} rows x {union.size} distinct ids",
                expected=f"at most {_UNION_CELLS:,} values",
                hint="score shorter completions, or use the teacher's own top K",
            )
        body = build_sglang_candidates(array, start, union, adapter=self._adapter)
        decode = partial(read_sglang_candidates, ids=array, start=start, union=union, last_id=last_id)
        entries = rows * (int(union.size) + 1)
        matrix = await self._ask_scores(ROUTE, body, decode, ids=array, k=int(union.size), entries=entries)
        columns = np.searchsorted(union, np.maximum(wanted, union[0]))
        values = np.take_along_axis(matrix, columns, axis=1)
        return np.where(wanted >= 0, values, -np.inf).astype(np.float32)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw n completions with the logprobs they were sampled with, the stop token kept.

        Served logprobs follow the temperature but no truncation or penalty: with those ``Rollout.logp`` is NaN.
        """
        facts, vocab_size = await self.facts(), await self._know_vocab_size()
        asked = prepare_sample_request(prompt_ids, n, params, self._cut_k(max(k, 0), vocab_size), vocab_size)
        if k < 0:
            raise ConfigError("k must be at least 0", got=k)
        if not facts.draws_by_seed:  # the seed changes nothing, and is not sent
            result = await self._sample(asked, replace(asked.params, seed=None))
        else:  # copies of one request would be equal: each gets a seed of its own
            seeds = [asked.params.seed or 0]
            if n > 1:
                seeds = np.random.SeedSequence(seeds[0]).generate_state(n).tolist()
            own = [replace(asked.params, seed=seed) for seed in seeds]
            draws = await asyncio.gather(*(self._sample(replace(asked, n=1), params) for params in own))
            result = [rollout for [rollout] in draws]
        self._count_rollouts(result, asked)
        return result

    async def _sample(self, asked: SampleRequest, params: SamplingParams) -> list[Rollout]:
        # A tempered draw's own logprob is what SGLang serves; whether it is depends on a server flag, so only
        # temperature 1, where both readings agree, counts as exact.
        tempered = SamplingParams(params.max_tokens, stop_token_ids=params.stop_token_ids, seed=params.seed)
        asked = replace(asked, params=params, exact=params == tempered)
        body = build_sglang_sample(asked.prompt, params, asked.n, asked.k, adapter=self._adapter)
        return await self._ask_rollouts(ROUTE, body, partial(read_sglang_rollouts, asked=asked), asked)
