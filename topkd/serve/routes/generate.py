"""``/inference/v1/generate``: ids in, ids out; the only route that scores chosen candidates."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topkd.serve.engine.jobs import Answer, Completion, EngineJob
from topkd.serve.engine.refusal import Refusal, bad_parameter
from topkd.serve.engine.served import Served
from topkd.serve.routes import replies
from topkd.serve.routes.openai import count_shown_entries, refuse_streamed_scores
from topkd.serve.routes.prompts import too_long
from topkd.serve.routes.requests import GenerateBody, check_candidate_ids, check_k, check_max_tokens, check_prompt_ids
from topkd.serve.routes.unsupported import refuse_unsupported
from topkd.serve.routes.wire import cancel_if_disconnected, json_reply, list_routes, read


def list_generate_routes(served: Served) -> list[Route]:
    """List the route of this dialect."""

    async def generate(request: Request) -> Response:
        body = await read(request, GenerateBody, served.config.max_body_bytes)
        job = _plan(served, body)
        [answer] = await cancel_if_disconnected(request, served.engine.submit([job]))
        return json_reply(await served.write(_reply, served, body, job, answer))

    return list_routes({"/inference/v1/generate": generate}, "POST")


def _plan(served: Served, body: GenerateBody) -> EngineJob:
    adapter = served.adapter_of(body.model)
    fields = body.sampling_params
    for part in (body, fields):
        refuse_unsupported(part)
    if fields.stop and not fields.detokenize:
        raise Refusal("stop strings are only supported when detokenize is True. Set detokenize=True to use stop.")
    if body.output_mode == "text" and not fields.detokenize:
        raise Refusal("output_mode='text' requires sampling_params.detokenize to be true")
    if body.stream and fields.prompt_logprob_token_ids is not None:
        raise Refusal("prompt_logprob_token_ids are not available when stream=true.")
    refuse_streamed_scores(stream=body.stream, prompt_logprobs=fields.prompt_logprobs)
    if body.stream:
        message = "topkd serve streams on the OpenAI routes only: send stream=false."
        raise bad_parameter(message, "stream", value=True)
    limit = served.config.max_logprobs
    scored = check_k(fields.prompt_logprobs, served.vocab, limit, what="prompt")
    logprobs = check_k(fields.logprobs, served.vocab, limit, what="sample")
    length = len(body.token_ids)
    if fields.max_tokens is not None:
        check_max_tokens(fields.max_tokens)
    if length >= served.context:
        raise too_long(served, length)
    ids = check_prompt_ids(body.token_ids, served.vocab)
    candidates, start = check_candidate_ids(fields, length, served.vocab, limit)
    left = served.context - length
    sampling = fields.sampling(
        max_tokens=left if fields.max_tokens is None else min(fields.max_tokens, left),
        logprobs=logprobs,
        vocab=served.vocab,
        detokenize=body.output_mode == "text" or bool(fields.stop),
    )
    return EngineJob(ids, sampling, fields.n, scored, candidates, start, adapter)


def _reply(served: Served, body: GenerateBody, job: EngineJob, answer: Answer) -> dict[str, Any]:
    fields = body.sampling_params
    rows = None
    if answer.scores is not None:
        words = served.words if fields.detokenize else None
        rows = replies.prompt_logprobs(answer.scores, job.ids[1:], words, flat=fields.flat_logprobs)
    elif job.prompt_logprobs is not None and len(job.ids) == 1:
        rows = msgspec.Raw(b"[{}]" if fields.flat_logprobs else b"[null]")
    return {
        "request_id": f"generate-tokens-{uuid.uuid4().hex[:16]}",
        "model": body.model or served.config.name,
        "created": int(time.time()),
        "usage": replies.usage(len(job.ids), answer.completions),
        "prompt_logprobs": rows,
        "prompt_token_id_logprobs": None if answer.candidate_logp is None else replies.matrix(answer.candidate_logp),
        "prompt_token_ids": list(job.ids) if body.return_token_ids else None,
        "mm_placeholders": None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "output_mode": body.output_mode,
        "choices": [_choice(served, body, job, index, out) for index, out in enumerate(answer.completions)],
    }


def _choice(served: Served, body: GenerateBody, job: EngineJob, index: int, out: Completion) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "finish_reason": out.finish_reason,
        "stop_reason": out.stop_reason,
        "token_ids": out.token_ids,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": replies.weight_versions(out),
        "logprobs": None,
    }
    if body.output_mode == "text":
        choice["text"] = out.text
    if job.sampling.logprobs is not None:
        k = max(
            1, count_shown_entries(job.sampling)
        )  # here, unlike in chat, the drawn token is listed even when K is 0
        text = body.output_mode == "text"
        choice["logprobs"] = (
            replies.chat_logprobs(out, served.words, k=k, as_ids=False) if text else replies.generate_logprobs(out, k=k)
        )
    return choice
