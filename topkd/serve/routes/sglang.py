"""SGLang's ``/generate`` as SGLang 0.5.23 was seen to answer on CPU, where it does not end its own process.

Scores come as nested lists or as flat base64 arrays; lists start at ``logprob_start_len`` with a null entry, hold
exactly K entries by rank, and the realised token stands apart: the last id of the vocabulary is shown there as 0.
Logprobs of drawn tokens follow the temperature, unlike vLLM's; a seed changes nothing. A K above the vocabulary is cut
to it and an id outside it refused, which end the real server.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topkd import __version__
from topkd.serve.engine.jobs import Answer, Completion, EngineJob, SamplingJob
from topkd.serve.engine.refusal import Refusal
from topkd.serve.engine.served import Served
from topkd.serve.routes.requests import SamplingFields, TokenId, check_prompt_ids
from topkd.serve.routes.unsupported import SGLANG_UNSUPPORTED, refuse_unsupported
from topkd.serve.routes.wire import cancel_if_disconnected, json_reply, read

SGLANG_DIALECT = "0.5.23"
# Generated positions clamp minus infinity to the smallest float32 that prints.
LOWEST = -3.4028234663852886e38
_RESERVED = 6  # tokens of the context that a prompt may not use


_IGNORED_KEYS = {"no_stop_trim", "spaces_between_special_tokens", "stream_interval"}
_OTHER_NAMES = {  # of the shared sampling fields, those that SGLang calls otherwise or does not have
    "max_tokens", "min_tokens", "seed", "prompt_logprobs", "logprob_token_ids", "allowed_token_ids",
    "include_stop_str_in_output",
}  # fmt: skip


class SglangSampling(SamplingFields):
    """``sampling_params``, where the names differ from OpenAI's. Unknown keys are refused."""

    max_temperature: ClassVar[float] = math.inf
    min_temperature: ClassVar[float] = 0.0
    greedy_n: ClassVar[bool] = True
    any_stop_ids: ClassVar[bool] = True

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def check(self) -> None:
        """Refuse what SGLang refuses, in its words, and keys that change an answer and are not supported here."""
        unknown = ({*(self.model_extra or {})} - _IGNORED_KEYS) | (self.model_fields_set & _OTHER_NAMES)
        if unknown:
            raise PlainRefusal(f"Unexpected keyword argument '{min(unknown)}'")
        temperature, top_p = self.temperature, self.top_p
        if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
            raise Refusal(f"temperature must be a non-negative finite number, got {temperature}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise Refusal(f"top_p must be in (0, 1], got {top_p}.")
        if self.top_k == 0:
            raise Refusal("top_k must be -1 (disable) or at least 1, got 0.")


class SglangBody(BaseModel):
    """``/generate``. Keys unknown to SGLang are ignored; of a batch, most fields may be a list, one per item."""

    model_config = ConfigDict(extra="allow")

    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    text: str | list[str] | None = None
    sampling_params: SglangSampling | list[SglangSampling] = Field(default_factory=SglangSampling)
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    token_ids_logprob: list[int] | list[list[int]] | None = None
    return_text_in_logprobs: bool = False
    return_flat_raw_top_logprobs: bool = False
    return_flat_raw_top_logprobs_b64: bool = False
    stream: bool = False
    lora_path: str | list[str | None] | None = None
    rid: str | list[str] | None = None


@dataclass(frozen=True, slots=True)
class _Item:
    """What one prompt of a request asks for."""

    sampling: SglangSampling
    returns_logprob: bool
    start: int
    k: int
    wanted: tuple[int, ...]
    texts: bool
    flat: bool
    adapter: str | None
    rid: str


class PlainRefusal(Refusal):
    """A refusal whose body is ``{"error": "..."}``: SGLang answers so about the sampling parameters."""


def list_sglang_routes(served: Served) -> list[Route]:
    """List ``/generate`` and the routes that describe the server."""

    async def generate(request: Request) -> Response:
        body = await read(request, SglangBody, served.config.max_body_bytes)
        refuse_unsupported(body, SGLANG_UNSUPPORTED)
        prompts, many = _prompts(served, body)
        items = [_select(served, body, index, len(prompts), len(ids)) for index, ids in enumerate(prompts)]
        jobs = [_plan(served, item, ids) for item, ids in zip(items, prompts, strict=True)]
        begun = time.monotonic()
        answers = await cancel_if_disconnected(request, served.engine.submit(jobs))
        elapsed = time.monotonic() - begun
        replies = await served.write(
            lambda: [
                _reply(served, item, job, answer, out)
                for item, job, answer in zip(items, jobs, answers, strict=True)
                for out in answer.completions
            ]
        )
        for reply in replies:
            reply["meta_info"] |= {"e2e_latency": elapsed, "response_sent_to_client_ts": time.time()}
        return json_reply(replies if many or jobs[0].n > 1 else replies[0])

    async def server_info(_: Request) -> Response:
        config = served.config
        return json_reply(
            {
                "version": f"{SGLANG_DIALECT}+sglang.by.topkd.{__version__}",
                "model_path": served.folder,
                "served_model_name": config.name,
                "tokenizer_path": config.model,
                "context_length": served.context,
                "max_total_num_tokens": served.context,
                "max_req_input_len": served.context - _RESERVED,
                "enable_deterministic_inference": False,
                "enable_lora": config.enable_lora,
                "speculative_algorithm": None,
                "weight_version": served.engine.version,
            }
        )

    async def model_info(_: Request) -> Response:
        return json_reply(
            {
                "model_path": served.folder,
                "served_model_name": served.name,
                "tokenizer_path": served.config.model,
                "is_generation": True,
                "weight_version": served.engine.version,
            }
        )

    gets = {"/server_info": server_info, "/get_server_info": server_info}
    gets |= {"/model_info": model_info, "/get_model_info": model_info}
    return [
        Route("/generate", answer_flatly(generate), methods=["POST", "PUT"]),
        *(Route(path, answer_flatly(handler), methods=["GET"]) for path, handler in gets.items()),
    ]


def answer_flatly(handler: Any) -> Any:
    """Answer refusals as ``{"error": {"message"}}``, as SGLang's native routes do."""

    async def route(request: Request) -> Response:
        try:
            return await handler(request)  # type: ignore[no-any-return]
        except PlainRefusal as refusal:
            return json_reply({"error": refusal.message}, refusal.status)
        except Refusal as refusal:
            return json_reply({"error": {"message": refusal.message}}, refusal.status)

    return route


def _prompts(served: Served, body: SglangBody) -> tuple[list[list[int]], bool]:
    """Return (prompts, whether the reply is a list). Of text and ids, the ids count."""
    inputs = body.text if body.input_ids is None else body.input_ids
    if inputs is None:
        raise Refusal("Either text, input_ids or input_embeds should be provided.")
    if not inputs:
        raise Refusal("input_ids cannot be empty." if body.input_ids is not None else "The input is empty.")
    if isinstance(inputs, str):
        return [served.words.encode(inputs, add_special_tokens=True)], False
    if isinstance(inputs[0], int):
        return [inputs], False
    return [
        served.words.encode(item, add_special_tokens=True) if isinstance(item, str) else item for item in inputs
    ], True


def _select(served: Served, body: SglangBody, index: int, count: int, length: int) -> _Item:
    """Return what prompt ``index`` of ``count`` asks for: fields that are lists have one value for each prompt."""

    def pick(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) != count:
            raise Refusal(f"A list of {len(value)} values for {count} prompts.")
        return value[index]

    if body.stream:
        raise Refusal("This server does not stream: send stream=false.")
    if body.return_flat_raw_top_logprobs_b64 and not body.return_flat_raw_top_logprobs:
        raise Refusal(
            "return_flat_raw_top_logprobs_b64 requires return_flat_raw_top_logprobs or "
            "return_flat_raw_output_top_logprobs."
        )
    wanted = body.token_ids_logprob or []
    wanted = pick(wanted) if wanted and isinstance(wanted[0], list) else wanted
    outside = next((token for token in wanted if not 0 <= token < served.vocab), None)
    if outside is not None:
        raise Refusal(
            f"token_ids_logprob contains out-of-vocabulary token id {outside}; valid range is [0, {served.vocab})."
        )
    start = pick(body.logprob_start_len)
    if start > length:
        raise Refusal(
            f"req.logprob_start_len={start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={length}. Please use a smaller logprob_start_len."
        )
    if start < -1:
        raise Refusal(f"logprob_start_len must be in [-1, {length}], got {start}.")
    return _Item(
        pick(body.sampling_params),
        bool(pick(body.return_logprob)),
        length if start == -1 else start,
        min(max(pick(body.top_logprobs_num), 0), served.vocab),
        tuple(wanted),
        body.return_text_in_logprobs,
        body.return_flat_raw_top_logprobs and body.return_flat_raw_top_logprobs_b64,
        pick(body.lora_path),
        pick(body.rid) or uuid.uuid4().hex,
    )


def _plan(served: Served, item: _Item, prompt: list[int]) -> EngineJob:
    fields, length, context = item.sampling, len(prompt), served.context
    fields.check()
    _check_lengths(fields.max_new_tokens, length, context)
    ids = check_prompt_ids(prompt, served.vocab)
    fields = fields.model_copy(
        update={
            "n": max(fields.n, 1),
            "min_tokens": min(fields.min_new_tokens, max(fields.max_new_tokens, 1)),
            "logprob_token_ids": list(item.wanted) or None,
        }
    )
    sampling: SamplingJob = fields.sampling(
        max_tokens=max(1, fields.max_new_tokens),
        logprobs=item.k if item.returns_logprob else None,
        vocab=served.vocab,
        scaled_logprobs=True,
    )
    scoring = item.returns_logprob and item.start < length
    candidates = None
    if scoring and item.wanted and length - 1 > item.start:
        candidates = np.tile(np.asarray(item.wanted, dtype=np.int32), (length - 1 - item.start, 1))
    return EngineJob(
        ids,
        sampling,
        fields.n,
        item.k if scoring else None,
        candidates,
        item.start if candidates is not None else 0,
        served.adapter_of(item.adapter),
    )


def _check_lengths(new: int, length: int, context: int) -> None:
    """Refuse a prompt that is too long, and one that leaves too little room for what is to be generated."""
    if length >= context:
        raise Refusal(f"The input ({length} tokens) is longer than the model's context length ({context} tokens).")
    if length >= context - _RESERVED:
        raise Refusal(
            f"Input length ({length} tokens) exceeds the maximum allowed length ({context - _RESERVED} tokens). "
            "Use a shorter input or enable --allow-auto-truncate."
        )
    if new < 0:
        raise Refusal(f"max_new_tokens must be at least 0, got {new}.")
    if length + new > context:
        raise Refusal(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested a "
            f"total of {length + new} tokens: {length} tokens from the input messages and {new} tokens for the "
            "completion. Please reduce the number of tokens in the input messages or the completion to fit within "
            "the limit."
        )


def _reply(served: Served, item: _Item, job: EngineJob, answer: Answer, out: Completion) -> dict[str, Any]:
    new = item.sampling.max_new_tokens
    shown = out if new else Completion(finish_reason="length")
    reason: dict[str, Any] = {"type": shown.finish_reason}
    if shown.finish_reason == "length":
        reason["length"] = new
    elif shown.finish_reason == "stop":
        reason["matched"] = shown.token_ids[-1] if shown.stop_reason is None else shown.stop_reason
    meta: dict[str, Any] = {
        "id": item.rid,
        "finish_reason": reason,
        "prompt_tokens": len(job.ids),
        "weight_version": served.engine.version if not out.versions else out.versions[-1],
        "num_retractions": 0,
    }
    if item.returns_logprob:
        meta |= _input_logprobs(served, item, job, answer)
        meta |= _output_logprobs(served, item, shown, out)
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(shown.token_ids),
        "cached_tokens": 0,
        "weight_versions": _spans(shown.versions, meta["weight_version"]),
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    return {"text": shown.text, "output_ids": shown.token_ids, "meta_info": meta}


def _spans(versions: list[str], current: str) -> list[dict[str, Any]]:
    """List runs of tokens that were drawn from one version of the weights."""
    spans: list[dict[str, Any]] = []
    for position, version in enumerate(versions):
        if not spans or spans[-1]["version"] != version:
            spans.append({"version": version, "start": position, "end": position})
        spans[-1]["end"] = position + 1
    return spans or [{"version": current, "start": 0, "end": 0}]


def _input_logprobs(served: Served, item: _Item, job: EngineJob, answer: Answer) -> dict[str, Any]:
    start, length = item.start, len(job.ids)
    empty: list[Any] = [] if start == length else [None]
    scores, rows = answer.scores, slice(start, length - 1)
    actual = [] if scores is None else [_finite_or_none(x) for x in scores.actual_logp[rows]]
    shown = [0 if token == served.vocab - 1 else token for token in job.ids[start:]]  # as the real one writes it
    named = [_name_token(served, item, token) for token in shown]
    meta: dict[str, Any] = {
        "input_token_logprobs": [[logp, *name] for logp, name in zip([*empty, *actual], named, strict=False)]
    }
    if item.k:
        ids = np.empty((0, item.k), np.int64) if scores is None else scores.ids[rows]
        logps = np.empty((0, item.k), np.float32) if scores is None else scores.logp[rows]
        if item.flat:
            meta |= {
                "input_top_logprobs_val_flat_b64": _encode_base64(logps, "<f4"),
                "input_top_logprobs_val_flat_b64_dtype": "float32",
                "input_top_logprobs_idx_flat_b64": _encode_base64(ids, "<i4"),
                "input_top_logprobs_idx_flat_b64_dtype": "int32",
                "input_top_logprobs_shape": list(ids.shape),
                "input_top_logprobs_null_prefix": len(empty),
            }
        else:
            rows_listed = zip(ids, logps, strict=True)
            meta["input_top_logprobs"] = empty + [_list_entries(served, item, *row) for row in rows_listed]
    if item.wanted:
        candidates: Any = [] if answer.candidate_logp is None else answer.candidate_logp
        chosen = [_list_entries(served, item, item.wanted, row) for row in candidates]
        meta["input_token_ids_logprobs"] = empty + chosen
    return meta


def _list_entries(served: Served, item: _Item, ids: Any, logps: Any) -> list[list[Any]]:
    """List a row's entries; a logprob that is not finite is null."""
    return [[_finite_or_none(x), *_name_token(served, item, int(i))] for i, x in zip(ids, logps, strict=True)]


def _output_logprobs(served: Served, item: _Item, shown: Completion, out: Completion) -> dict[str, Any]:
    """List drawn tokens; with max_new_tokens 0 the lists of the token that was not kept are there all the same."""
    drawn = zip(shown.logp, shown.token_ids, strict=True)
    meta: dict[str, Any] = {
        "output_token_logprobs": [[_clamp(logp), *_name_token(served, item, token)] for logp, token in drawn],
        "output_token_logprobs_length": len(shown.token_ids),
    }
    listed = [
        dict(zip(ids.tolist(), logps.tolist(), strict=True))
        for ids, logps in zip(out.top_ids, out.top_logp, strict=True)
    ]
    if item.k:
        meta["output_top_logprobs"] = [
            [[_clamp(x), *_name_token(served, item, i)] for i, x in sorted(row.items(), key=lambda e: -e[1])[: item.k]]
            for row in listed
        ]
    if item.wanted:
        meta["output_token_ids_logprobs"] = [
            [[_clamp(row.get(i, math.nan)), *_name_token(served, item, i)] for i in item.wanted] for row in listed
        ]
    return meta


def _name_token(served: Served, item: _Item, token: int) -> tuple[int, str | None]:
    return token, served.words.text(token) if item.texts else None


def _finite_or_none(logp: float) -> float | None:
    """Return None for what is not finite, as orjson writes null."""
    return float(logp) if np.isfinite(logp) else None


def _clamp(logp: float) -> float | None:
    return None if np.isnan(logp) else max(float(logp), LOWEST)


def _encode_base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
