"""SGLang's ``/generate``: scores as flat base64 arrays, samples, and scores shared lists of candidates.

Written from SGLang 0.5's source and documents and tried on ``topkd serve``; no reply of a real SGLang was recorded.
Sampled logprobs follow the temperature there (scores never do), so a draw is exact at temperature 1 only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from topkd.clients.decoding.checks import check_request_ids, prepare_candidates
from topkd.clients.decoding.sampled import prepare_sample_request
from topkd.clients.decoding.sglang import read_sglang_candidates, read_sglang_rollouts, read_sglang_scores
from topkd.clients.dialects.base import ScoringClient, ServerFacts, ServerInfo, Wire
from topkd.topk.errors import UnsupportedError
from topkd.topk.protocols import Ids
from topkd.topk.samples import Rollout, SamplingParams
from topkd.topk.types import Float32, Int32, TopK

ROUTE = "/generate"
_UNION_CELLS = 4_000_000  # rows x distinct ids of one request: nested JSON of about 40 bytes each


def build_sglang_score(ids: Int32, start: int, k: int) -> dict[str, Any]:
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
    }


def build_sglang_candidates(ids: Int32, start: int, candidates: Int32) -> dict[str, Any]:
    """Build a request that scores the same ``candidates`` at every row ``start ..``."""
    return build_sglang_score(ids, start, 0) | {"token_ids_logprob": candidates.tolist()}


def build_sglang_sample(prompt: Int32, params: SamplingParams, n: int, k: int) -> dict[str, Any]:
    """Build a sampling request with every parameter stated."""
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
            "sampling_seed": params.seed,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
    }


class Sglang(ScoringClient):
    """Teacher, shared-list candidate scorer and sampler over ``/generate``.

    Args:
        base_url: ``http(s)://host:port``.
        **options: Those of every client: see ``ClientOptions``.
    """

    dialect = "sglang"

    @classmethod
    async def matches(cls, server: ServerFacts) -> bool:
        """Recognise an SGLang: it states its own version in ``/server_info``."""
        for route in ("/server_info", "/get_server_info"):
            info = await server.wire.get(route)
            if info is not None and ("sglang" in str(info.get("version", "")) or "tokenizer_path" in info):
                return True
        return await server.wire.mounted("/generate") and bool(await server.wire.get("/model_info"))

    async def server_info(self) -> ServerInfo:
        """Ask as the base class does, and take the version that ``/server_info`` states."""
        info = await super().server_info()
        server_state = await Wire(self).get("/server_info") or await Wire(self).get("/get_server_info") or {}
        length = info.max_model_len
        if length is None and isinstance(server_state.get("max_total_num_tokens"), int):
            length = server_state.get("context_length") if isinstance(server_state.get("context_length"), int) else None
        return ServerInfo(info.model, length, str(server_state.get("version") or info.version), info.models)

    async def score(self, ids: Ids, start: int, k: int) -> TopK:
        """Score, as ``TeacherScorer``: only the rows from ``start`` are sent, a cached prefix is used up to there."""
        array = check_request_ids(ids, start, k, self.vocab_size)
        rows = int(array.size) - 1 - start
        body = build_sglang_score(array, start, k)
        decode = partial(read_sglang_scores, ids=array, start=start, k=k, vocab_size=self.vocab_size)
        entries = rows * (k + 1)
        topk, zeros, flat = await self._ask_scores(ROUTE, body, decode, ids=array, k=k, entries=entries)
        self._count_scores(topk, zeros)
        self.metrics_.add("decoded_flat" if flat else "decoded_nested")
        return topk

    async def score_candidates(self, ids: Ids, start: int, candidates: Int32) -> Float32:
        """Score ``candidates`` [R, K] (-1 pads give -inf), through one list that all rows share.

        Raises:
            UnsupportedError: rows times distinct candidates is more than one reply should hold.
        """
        array = check_request_ids(ids, start, 0, self.vocab_size)
        rows = int(array.size) - 1 - start
        wanted = prepare_candidates(candidates, rows, self.vocab_size)
        union = np.unique(wanted[wanted >= 0]).astype(np.int32)
        if not union.size:
            return np.full(wanted.shape, -np.inf, dtype=np.float32)
        if rows * union.size > _UNION_CELLS:
            raise UnsupportedError(
                "SGLang takes one list of candidates for all rows, and these rows share too few",
                where=self.where(),
                got=f"{rows} rows x {union.size} distinct ids",
                expected=f"at most {_UNION_CELLS:,} values",
                hint="score shorter completions, or use the teacher's own top K",
            )
        body = build_sglang_candidates(array, start, union)
        decode = partial(read_sglang_candidates, ids=array, start=start, union=union)
        entries = rows * (int(union.size) + 1)
        matrix = await self._ask_scores(ROUTE, body, decode, ids=array, k=int(union.size), entries=entries)
        columns = np.searchsorted(union, np.maximum(wanted, union[0]))
        values = np.take_along_axis(matrix, columns, axis=1)
        return np.where(wanted >= 0, values, -np.inf).astype(np.float32)

    async def sample(self, prompt_ids: Ids, n: int, params: SamplingParams, *, k: int = 0) -> list[Rollout]:
        """Draw n completions with the logprobs they were sampled with, the stop token kept.

        Served logprobs follow the temperature but no truncation or penalty: with those ``Rollout.logp`` is NaN.
        """
        asked = prepare_sample_request(prompt_ids, n, params, k, self.vocab_size)
        params = asked.params
        # A tempered draw's own logprob is what SGLang serves; whether it is depends on a server flag, so only
        # temperature 1, where both readings agree, counts as exact.
        tempered = SamplingParams(params.max_tokens, stop_token_ids=params.stop_token_ids, seed=params.seed)
        asked = replace(asked, exact=params == tempered)
        body = build_sglang_sample(asked.prompt, params, n, k)
        result = await self._ask_rollouts(ROUTE, body, partial(read_sglang_rollouts, asked=asked), asked)
        self._count_rollouts(result, asked)
        return result
