"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topkd.serve.engine.jobs import Answer, Completion, EngineJob, SamplingJob
from topkd.serve.engine.refusal import bad_parameter
from topkd.serve.engine.served import Served
from topkd.serve.routes import replies
from topkd.serve.routes.prompts import check_room, encode_chat, make_prompts, render_chat, room, too_long
from topkd.serve.routes.requests import (
    ChatBody,
    CompletionBody,
    OpenAIBody,
    check_k,
    check_max_tokens,
    check_prompt_ids,
)
from topkd.serve.routes.streaming import ChunkHead, Delta, EventStream, JobStream
from topkd.serve.routes.unsupported import refuse_tool_calls, refuse_unsupported
from topkd.serve.routes.wire import cancel_if_disconnected, json_reply, list_routes, read

PromptRows = msgspec.Raw | None  # JSON: a row for each token of a prompt, the first one's null


def list_openai_routes(served: Served) -> list[Route]:
    """List the two OpenAI routes."""

    async def completions(request: Request) -> Response:
        body = await read(request, CompletionBody, served.config.max_body_bytes)
        plan = _plan_completions(served, body)
        if body.stream:
            jobs = JobStream(served, plan.jobs)
            return EventStream(jobs, _stream_completions(served, body, plan, jobs))
        answers = await cancel_if_disconnected(request, served.engine.submit(plan.jobs))
        return json_reply(await served.write(_completions_reply, served, body, plan, answers))

    async def chat(request: Request) -> Response:
        body = await read(request, ChatBody, served.config.max_body_bytes)
        job, text = _plan_chat(served, body)
        if body.stream:
            jobs = JobStream(served, [job])
            return EventStream(jobs, _stream_chat(served, body, text, jobs))
        [answer] = await cancel_if_disconnected(request, served.engine.submit([job]))
        reply = await served.write(_chat_reply, served, body, job, answer)
        return json_reply(reply | ({"prompt_text": text} if body.return_prompt_text else {}))

    return list_routes({"/v1/completions": completions, "/v1/chat/completions": chat}, "POST")


def refuse_streamed_scores(*, stream: bool | None, prompt_logprobs: int | None) -> None:
    """Refuse to stream the scores of a prompt: chunks have no field for them."""
    if stream and prompt_logprobs is not None:
        raise bad_parameter("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")


def _check_stream(body: OpenAIBody) -> None:
    refuse_streamed_scores(stream=body.stream, prompt_logprobs=body.prompt_logprobs)
    if body.stream_options and not body.stream:
        raise bad_parameter("Stream options can only be defined when `stream=True`.", "stream_options")


@dataclass(frozen=True, slots=True)
class _Plan:
    jobs: list[EngineJob]
    logprobs: int | None
    show_drawn: bool  # max_tokens 0 with echo: one token is drawn for the engine's sake and not shown


def _plan_completions(served: Served, body: CompletionBody) -> _Plan:
    adapter = served.adapter_of(body.model)
    refuse_unsupported(body)
    _check_stream(body)
    check_room(served, body, body.max_tokens, "max_tokens")
    _check_named_ids(body, shows=body.logprobs is not None, expected="set")
    limit = served.config.max_logprobs
    scored = check_k(body.prompt_logprobs, served.vocab, limit, what="prompt", field="prompt_logprobs")
    logprobs = check_k(body.logprobs, served.vocab, limit, what="sample", field="logprobs")
    if body.echo and scored is None:
        scored = logprobs
    silent = bool(body.echo and body.max_tokens == 0)
    if silent and body.logprob_token_ids:
        message = (
            "`logprob_token_ids` is not supported when `echo=True` and `max_tokens=0` "
            "because no output tokens are generated."
        )
        raise bad_parameter(message, "logprob_token_ids")
    jobs = []
    for prompt in make_prompts(served, body):
        ids = check_prompt_ids(prompt, served.vocab) if len(prompt) <= served.context else tuple(prompt)
        left = room(served, len(ids))
        if silent and not left:
            raise too_long(served, len(ids))
        wanted = 1 if silent else check_max_tokens(min(body.max_tokens, left))
        sampling = body.sampling(max_tokens=wanted, logprobs=logprobs, vocab=served.vocab)
        jobs.append(EngineJob(ids, sampling, n=body.n, prompt_logprobs=scored, adapter=adapter))
    return _Plan(jobs, logprobs, not silent)


def count_shown_entries(sampling: SamplingJob) -> int:
    """Count the entries to show besides the drawn token; ids asked for by name are never cut."""
    return max(sampling.logprobs or 0, 1 + len(sampling.logprob_token_ids) if sampling.logprob_token_ids else 0)


def _show_completion(
    served: Served, body: CompletionBody, plan: _Plan, delta: Delta, rows: PromptRows, *, offset: int = 0
) -> dict[str, Any]:
    """Build the text and logprobs of a choice, or of a part of it; the first part repeats an echoed prompt."""
    job, first = plan.jobs[delta.job], delta.drawn.start == 0
    text = delta.text if plan.show_drawn else ""
    if body.echo and first and not body.return_token_ids:
        text = served.words.decode(list(job.ids)) + text
    logprobs = None
    if plan.logprobs is not None:
        logprobs = replies.completion_logprobs(
            delta.out,
            served.words,
            k=count_shown_entries(job.sampling),
            as_ids=bool(body.return_tokens_as_token_ids),
            drawn=delta.drawn if plan.show_drawn else range(0),
            echoed=zip(job.ids, msgspec.json.decode(rows), strict=True) if body.echo and first and rows else (),
            offset=offset,
        )
    return {"text": text, "logprobs": logprobs}


async def _stream_completions(
    served: Served, body: CompletionBody, plan: _Plan, jobs: JobStream
) -> AsyncGenerator[dict[str, Any], None]:
    envelope = served.envelope("cmpl", "text_completion", body.model)
    head = ChunkHead(envelope, body.stream_options, [len(job.ids) for job in plan.jobs])
    offsets: dict[int, int] = {}
    async for delta in jobs.follow():
        job, first = plan.jobs[delta.job], delta.drawn.start == 0
        rows = None
        if body.echo and first and plan.logprobs is not None:
            rows = await served.write(_prompt_rows, served, job, jobs.pending[delta.job].answer)
        index = delta.job * job.n + delta.index
        shown = _show_completion(served, body, plan, delta, rows, offset=offsets.get(index, 0))
        if shown["logprobs"] and shown["logprobs"]["tokens"]:
            offsets[index] = shown["logprobs"]["text_offset"][-1] + len(shown["logprobs"]["tokens"][-1])
        prompt_ids = list(job.ids) if body.return_token_ids and first else None
        choice = {"index": index, **shown, **_end_of(body, delta), "prompt_token_ids": prompt_ids}
        yield head.chunk(choice, delta.job, delta.drawn.stop)
    for chunk in head.closing():
        yield chunk


def _end_of(body: OpenAIBody, delta: Delta) -> dict[str, Any]:
    """Build the fields of a streamed choice that say how it ended, null before it has, and its token ids."""
    out = delta.out
    versions = delta.ended and body.return_weight_versions
    return {
        "finish_reason": out.finish_reason if delta.ended else None,
        "stop_reason": out.stop_reason if delta.ended else None,
        "token_ids": out.token_ids[delta.drawn.start : delta.drawn.stop] if body.return_token_ids else None,
        **({"weight_versions": replies.weight_versions(out)} if versions else {}),
    }


def _completions_reply(served: Served, body: CompletionBody, plan: _Plan, answers: Sequence[Answer]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    for number, (job, answer) in enumerate(zip(plan.jobs, answers, strict=True)):
        rows = _prompt_rows(served, job, answer)
        prompt = {"prompt_logprobs": rows, "prompt_token_ids": list(job.ids) if body.return_token_ids else None}
        for index, out in enumerate(answer.completions):
            whole = Delta(number, index, out, range(len(out.token_ids)), out.text, ended=True)
            shown = _show_completion(served, body, plan, whole, rows)
            choices.append(_build_choice(body, out, {"index": len(choices), **shown}, prompt))
    prompt_tokens = sum(len(job.ids) for job in plan.jobs)
    completions = [out for answer in answers for out in answer.completions]
    return {
        **served.envelope("cmpl", "text_completion", body.model),
        "choices": choices,
        "usage": replies.usage(prompt_tokens, completions),
    }


def _build_choice(
    body: CompletionBody | ChatBody, out: Completion, shown: dict[str, Any], prompt: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Build a choice of either route, in vLLM's order: what it shows, how it ended, and what is known of the prompt."""
    return {
        **shown,
        "finish_reason": out.finish_reason,
        "stop_reason": out.stop_reason,
        "token_ids": out.token_ids if body.return_token_ids else None,
        **(prompt or {}),
        "routed_experts": None,
        **({"weight_versions": replies.weight_versions(out)} if body.return_weight_versions else {}),
    }


def _prompt_rows(served: Served, job: EngineJob, answer: Answer) -> PromptRows:
    if job.prompt_logprobs is None:
        return None
    if answer.scores is None:  # a prompt of one token has nothing to score; an aborted one was never scored
        return msgspec.Raw(b"[null]") if len(job.ids) == 1 else None
    return replies.prompt_logprobs(answer.scores, job.ids[1:], served.words)


def _check_named_ids(body: OpenAIBody, *, shows: bool, expected: str) -> None:
    if body.logprob_token_ids and not shows:
        message = f"when using `logprob_token_ids`, `logprobs` must be {expected}."
        raise bad_parameter(message, "logprob_token_ids")


def _plan_chat(served: Served, body: ChatBody) -> tuple[EngineJob, str]:
    """Return the job of a chat and its rendered prompt."""
    adapter = served.adapter_of(body.model)
    refuse_unsupported(body)
    chosen = "tool_choice" in body.model_fields_set
    refuse_tool_calls(body.tools, body.tool_choice if chosen else "auto" if body.tools else None)
    _check_stream(body)
    if body.top_logprobs and not body.logprobs:
        raise bad_parameter("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    check_room(
        served, body, body.limit, "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    )
    _check_named_ids(body, shows=bool(body.logprobs), expected="set to true")
    limit = served.config.max_logprobs
    scored = check_k(body.prompt_logprobs, served.vocab, limit, what="prompt", field="prompt_logprobs")
    listed = check_k(body.top_logprobs or 0, served.vocab, limit, what="sample", field="top_logprobs")
    text = render_chat(served, body, body.messages)
    ids = check_prompt_ids(encode_chat(served, body, text), served.vocab)
    left = room(served, len(ids))
    wanted = check_max_tokens(left if body.limit is None else min(body.limit, left))
    sampling = body.sampling(max_tokens=wanted, logprobs=listed if body.logprobs else None, vocab=served.vocab)
    return EngineJob(ids, sampling, n=body.n, prompt_logprobs=scored, adapter=adapter), text


def _chat_reply(served: Served, body: ChatBody, job: EngineJob, answer: Answer) -> dict[str, Any]:
    choices = []
    for index, out in enumerate(answer.completions):
        chosen = _chat_logprobs(served, body, job, out)
        message = {
            "role": body.role,
            "content": out.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        choices.append(_build_choice(body, out, {"index": index, "message": message, "logprobs": chosen}))
    return {
        **served.envelope("chatcmpl", "chat.completion", body.model),
        "choices": choices,
        "usage": replies.usage(len(job.ids), answer.completions),
        "prompt_logprobs": _prompt_rows(served, job, answer),
        "prompt_token_ids": list(job.ids) if body.return_token_ids else None,
        "prompt_text": None,
    }


async def _stream_chat(
    served: Served, body: ChatBody, prompt_text: str, jobs: JobStream
) -> AsyncGenerator[dict[str, Any], None]:
    [pending] = jobs.pending
    job = pending.job
    head = ChunkHead(
        served.envelope("chatcmpl", "chat.completion.chunk", body.model), body.stream_options, [len(job.ids)]
    )
    prompt: dict[str, Any] = {
        "prompt_token_ids": list(job.ids) if body.return_token_ids else None,
        "prompt_text": prompt_text if body.return_prompt_text else None,
    }
    begun = False
    async for delta in jobs.follow():
        if not begun:  # the role comes before anything else, but not before it is known that the model works
            begun = True
            for index in range(job.n):
                first = {"role": body.role, "content": ""}
                yield head.chunk({"index": index, "delta": first, "logprobs": None, "finish_reason": None}, 0, **prompt)
        logprobs = _chat_logprobs(served, body, job, delta.out, delta.drawn)
        choice = {"index": delta.index, "delta": {"content": delta.text}, "logprobs": logprobs, **_end_of(body, delta)}
        yield head.chunk(choice, 0, delta.drawn.stop)
    for chunk in head.closing():
        yield chunk


def _chat_logprobs(
    served: Served, body: ChatBody, job: EngineJob, out: Completion, drawn: range | None = None
) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    k, as_ids = count_shown_entries(job.sampling), bool(body.return_tokens_as_token_ids)
    return replies.chat_logprobs(out, served.words, k=k, as_ids=as_ids, drawn=drawn)
