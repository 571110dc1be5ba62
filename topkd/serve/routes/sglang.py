"""SGLang's ``/generate``, written from its documents and source, never compared with a running SGLang.

Scores come as nested lists or as flat base64 arrays; lists start at ``logprob_start_len`` with a null entry, hold
exactly K entries by rank, and the realised token stands apart. Logprobs of drawn tokens follow the temperature, unlike
vLLM's.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
import uuid
from typing import Any, ClassVar

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
from topkd.serve.routes.wire import cancel_if_disconnected, json_reply, read

SGLANG_DIALECT = "0.5.23"
# Generated positions clamp minus infinity to the smallest float32 that prints.
LOWEST = -3.4e38


class SglangSampling(SamplingFields):
    """``sampling_params``, where the names differ from OpenAI's."""

    max_temperature: ClassVar[float] = math.inf
    greedy_n: ClassVar[bool] = True

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    sampling_seed: int | None = None


class SglangBody(BaseModel):
    """``/generate``. Unknown keys are ignored, as SGLang does."""

    model_config = ConfigDict(extra="ignore")

    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    text: str | list[str] | None = None
    sampling_params: SglangSampling = Field(default_factory=SglangSampling)
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = Field(default=0, ge=0)
    token_ids_logprob: list[TokenId] | None = None
    return_text_in_logprobs: bool = False
    return_flat_raw_top_logprobs: bool = False
    return_flat_raw_top_logprobs_b64: bool = False
    stream: bool = False
    lora_path: str | None = None
    rid: str | None = None


def list_sglang_routes(served: Served) -> list[Route]:
    """List ``/generate`` and the routes that describe the server."""

    async def generate(request: Request) -> Response:
        body = await read(request, SglangBody, served.config.max_body_bytes)
        prompts, many = _prompts(served, body)
        jobs = [_plan(served, body, ids) for ids in prompts]
        begun = time.monotonic()
        answers = await cancel_if_disconnected(request, served.engine.submit(jobs))
        elapsed = time.monotonic() - begun
        replies = await asyncio.to_thread(
            lambda: [
                _reply(served, body, job, answer, out)
                for job, answer in zip(jobs, answers, strict=True)
                for out in answer.completions
            ]
        )
        for reply in replies:
            reply["meta_info"]["e2e_latency"] = elapsed
        return json_reply(replies if many or jobs[0].n > 1 else replies[0])

    async def server_info(_: Request) -> Response:
        config = served.config
        return json_reply(
            {
                "version": f"{SGLANG_DIALECT}+sglang.by.topkd.{__version__}",
                "model_path": config.model,
                "served_model_name": config.name,
                "tokenizer_path": config.model,
                "context_length": served.context,
                "speculative_algorithm": None,
                "weight_version": served.engine.version,
            }
        )

    async def model_info(_: Request) -> Response:
        path = served.config.model
        version = served.engine.version
        return json_reply(
            {"model_path": path, "tokenizer_path": path, "is_generation": True, "weight_version": version}
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
        except Refusal as refusal:
            return json_reply({"error": {"message": refusal.message}}, refusal.status)

    return route


def _prompts(served: Served, body: SglangBody) -> tuple[list[list[int]], bool]:
    """Return (prompts, whether the reply is a list)."""
    if (body.input_ids is None) == (body.text is None):
        raise Refusal("Either text or input_ids should be provided.")
    inputs = body.text if body.input_ids is None else body.input_ids
    if not inputs:
        raise Refusal("The input is empty.")
    if isinstance(inputs, str):
        return [served.words.encode(inputs, add_special_tokens=True)], False
    if isinstance(inputs[0], int):
        return [inputs], False
    return [
        served.words.encode(item, add_special_tokens=True) if isinstance(item, str) else item for item in inputs
    ], True


def _plan(served: Served, body: SglangBody, prompt: list[int]) -> EngineJob:
    if body.stream:
        raise Refusal("This server does not stream: send stream=false.")
    fields, length = body.sampling_params, len(prompt)
    if length >= served.context:
        raise Refusal(
            f"The input ({length} tokens) is longer than the model's context length ({served.context} tokens)."
        )
    ids = check_prompt_ids(prompt, served.vocab)
    if fields.max_new_tokens < 0:
        raise Refusal(f"max_new_tokens must be at least 0, got {fields.max_new_tokens}.")
    start = _start(body, length)
    k = min(body.top_logprobs_num, served.vocab)
    wanted = [token for token in body.token_ids_logprob or [] if token < served.vocab]
    if len(wanted) != len(body.token_ids_logprob or []):
        raise Refusal(f"token_ids_logprob contains ids outside the vocabulary of {served.vocab}.")
    scoring = body.return_logprob and start < length
    fields = fields.model_copy(
        update={
            "seed": fields.sampling_seed,
            "min_tokens": min(fields.min_new_tokens, max(fields.max_new_tokens, 1)),
            "logprob_token_ids": None,
        }
    )
    sampling: SamplingJob = fields.sampling(
        max_tokens=max(1, min(fields.max_new_tokens, served.context - length)),
        logprobs=k if body.return_logprob else None,
        vocab=served.vocab,
        scaled_logprobs=True,
    )
    candidates = None
    if scoring and wanted and length - 1 > start:
        candidates = np.tile(np.asarray(wanted, dtype=np.int32), (length - 1 - start, 1))
    adapter = served.adapter_of(body.lora_path)
    return EngineJob(
        ids, sampling, fields.n, k if scoring else None, candidates, start if candidates is not None else 0, adapter
    )


def _start(body: SglangBody, length: int) -> int:
    """Return the first token whose logprob is returned; -1 returns none of the prompt's."""
    start = body.logprob_start_len
    if start < -1 or start > length:
        raise Refusal(f"logprob_start_len must be in [-1, {length}], got {start}.")
    return length if start == -1 else start


def _reply(served: Served, body: SglangBody, job: EngineJob, answer: Answer, out: Completion) -> dict[str, Any]:
    shown = out if body.sampling_params.max_new_tokens else Completion(finish_reason="length")
    reason: dict[str, Any] = {"type": shown.finish_reason}
    if shown.finish_reason == "length":
        reason["length"] = body.sampling_params.max_new_tokens
    elif shown.finish_reason == "stop":
        reason["matched"] = shown.token_ids[-1] if shown.stop_reason is None else shown.stop_reason
    meta: dict[str, Any] = {
        "id": body.rid or uuid.uuid4().hex,
        "finish_reason": reason,
        "prompt_tokens": len(job.ids),
        "completion_tokens": len(shown.token_ids),
        "cached_tokens": 0,
        "weight_version": served.engine.version if not out.versions else out.versions[-1],
    }
    if body.return_logprob:
        meta |= _input_logprobs(served, body, job, answer)
        meta |= _output_logprobs(served, body, shown)
    return {"text": shown.text, "output_ids": shown.token_ids, "meta_info": meta}


def _input_logprobs(served: Served, body: SglangBody, job: EngineJob, answer: Answer) -> dict[str, Any]:
    start, length = _start(body, len(job.ids)), len(job.ids)
    empty: list[Any] = [] if start == length else [None]
    meta: dict[str, Any] = {
        "input_token_logprobs": [[None, *_name_token(served, body, job.ids[start])]] if empty else []
    }
    scores = answer.scores
    rows = slice(start, length - 1)
    actual = [] if scores is None else [_finite_or_none(x) for x in scores.actual_logp[rows]]
    for logp, token in zip(actual, job.ids[start + 1 :], strict=scores is not None):
        meta["input_token_logprobs"].append([logp, *_name_token(served, body, token)])
    if body.top_logprobs_num:
        k = min(body.top_logprobs_num, served.vocab)
        ids = np.empty((0, k), np.int64) if scores is None else scores.ids[rows]
        logps = np.empty((0, k), np.float32) if scores is None else scores.logp[rows]
        if body.return_flat_raw_top_logprobs and body.return_flat_raw_top_logprobs_b64:
            meta |= {
                "input_top_logprobs_val_flat_b64": _encode_base64(logps, "<f4"),
                "input_top_logprobs_idx_flat_b64": _encode_base64(ids, "<i4"),
                "input_top_logprobs_shape": list(ids.shape),
                "input_top_logprobs_null_prefix": len(empty),
            }
        else:
            rows_listed = zip(ids, logps, strict=True)
            meta["input_top_logprobs"] = empty + [_list_entries(served, body, *row) for row in rows_listed]
    if body.token_ids_logprob:
        candidates: Any = [] if answer.candidate_logp is None else answer.candidate_logp
        chosen = [_list_entries(served, body, body.token_ids_logprob, row) for row in candidates]
        meta["input_token_ids_logprobs"] = empty + chosen
    return meta


def _list_entries(served: Served, body: SglangBody, ids: Any, logps: Any) -> list[list[Any]]:
    """List a row's entries; a logprob that is not finite is null."""
    return [[_finite_or_none(x), *_name_token(served, body, int(i))] for i, x in zip(ids, logps, strict=True)]


def _output_logprobs(served: Served, body: SglangBody, out: Completion) -> dict[str, Any]:
    drawn = zip(out.logp, out.token_ids, strict=True)
    meta: dict[str, Any] = {
        "output_token_logprobs": [[_clamp(logp), *_name_token(served, body, token)] for logp, token in drawn]
    }
    if body.top_logprobs_num:
        meta["output_top_logprobs"] = [
            [[_clamp(x), *_name_token(served, body, int(i))] for i, x in zip(ids, logps, strict=True)]
            for ids, logps in zip(out.top_ids, out.top_logp, strict=True)
        ]
    return meta


def _name_token(served: Served, body: SglangBody, token: int) -> tuple[int, str | None]:
    return token, served.words.text(token) if body.return_text_in_logprobs else None


def _finite_or_none(logp: float) -> float | None:
    """Return None for what is not finite, as orjson writes null."""
    return float(logp) if np.isfinite(logp) else None


def _clamp(logp: float) -> float | None:
    return None if np.isnan(logp) else max(float(logp), LOWEST)


def _encode_base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
