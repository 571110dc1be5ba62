"""Prompts of the OpenAI routes: texts and messages to ids, truncation, and what fits into the context."""

from __future__ import annotations

import json
import re
from typing import Any

from topkd.serve.engine.refusal import Refusal, bad_parameter
from topkd.serve.engine.served import Served
from topkd.serve.routes.requests import ChatBody, CompletionBody, OpenAIBody, TemplateFields

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
# A template that goes through the parts of a content itself is given them; any other one gets their texts, joined.
_ITERATES_PARTS = re.compile(r"for\s+\w+\s+in\s+(\w+(\.|\[['\"]))?content\b(?!\s*[.(])")


def room(served: Served, length: int) -> int:
    """Return how many tokens fit behind a prompt; refuse a prompt longer than the context."""
    if length > served.context:
        message = (
            f"This model's maximum context length is {served.context} tokens. However, your prompt contains at least "
            f"{served.context + 1} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )
        # vLLM stops counting one token past the limit.
        raise bad_parameter(message, "input_tokens", served.context + 1)
    return served.context - length


def too_long(served: Served, length: int) -> Refusal:
    """Build the refusal of a prompt longer than the context."""
    limit = served.context
    if length > limit:
        what, parts = f"(length {length}) is longer than", "text tokens."
    else:
        what = f"(length {length}) plus the number of requested output tokens (at least 1) is longer than"
        parts = "text tokens (prompt + requested output tokens)."
    return Refusal(
        f"The decoder prompt {what} the maximum model length of {limit}. "
        f"Make sure that `max_model_len` is no smaller than the number of {parts}"
    )


def check_room(served: Served, body: OpenAIBody, wanted: int | None, field: str) -> None:
    """Refuse more output tokens, or a longer cut prompt, than the context holds."""
    if wanted is not None and wanted > served.context:
        message = (
            f"{field}={wanted} cannot be greater than max_model_len={served.context}. "
            "Please request fewer output tokens."
        )
        raise bad_parameter(message, field, wanted)
    cut = body.truncate_prompt_tokens
    if cut is not None and cut > served.context:
        message = (
            f"truncate_prompt_tokens={cut} cannot be greater than max_model_len = {served.context}. "
            "Please request a smaller truncation size."
        )
        raise bad_parameter(message, "truncate_prompt_tokens", cut)


def make_prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    """Return the ids of each prompt."""
    prompt = body.prompt
    if prompt is None or prompt == "":
        raise bad_parameter("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if not prompt:
        raise Refusal("You must pass at least one prompt")
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    reserved = bool(body.max_tokens)
    return [
        _encode(served, body, item, reserved=reserved)
        if isinstance(item, str)
        else _cut(served, body, item, reserved=reserved)
        for item in prompt
    ]


def _limit(served: Served, body: OpenAIBody, *, reserved: bool) -> int | None:
    cut = body.truncate_prompt_tokens
    return served.context - reserved if cut == -1 else cut


def _cut(served: Served, body: OpenAIBody, ids: list[int], *, reserved: bool) -> list[int]:
    """Keep the last (or with truncation_side "right" the first) tokens, as many as were asked for."""
    limit = _limit(served, body, reserved=reserved)
    if limit is None or len(ids) <= limit:
        return ids
    return ids[:limit] if body.truncation_side == "right" else ids[len(ids) - limit :]


def _encode(served: Served, body: OpenAIBody, text: str, *, reserved: bool) -> list[int]:
    """Encode a text and cut it. Without a truncation_side the tokenizer cuts, which keeps its special tokens."""
    ids = served.words.encode(text, add_special_tokens=body.add_special_tokens)
    limit = _limit(served, body, reserved=reserved)
    if limit is None or len(ids) <= limit or body.truncation_side or not body.add_special_tokens:
        return _cut(served, body, ids, reserved=reserved)
    plain = served.words.encode(text, add_special_tokens=False)
    added = len(ids) - len(plain)
    if limit < added:
        raise bad_parameter(
            f"truncate_prompt_tokens={limit} leaves no room for the {added} special tokens that this tokenizer adds: "
            "ask for more tokens, or send add_special_tokens=false.",
            "truncate_prompt_tokens",
            limit,
        )
    kept = plain[len(plain) - (limit - added) :]
    cuts = {
        (*ids[:before], *kept, *ids[before + len(plain) :])
        for before in range(added + 1)
        if ids[before : before + len(plain)] == plain
    }
    if len(cuts) != 1:  # a prefix may join the first token, or the text may begin as the special tokens do
        raise bad_parameter(
            "This tokenizer's special tokens cannot be told apart from those of the text, which is to be cut to "
            f"truncate_prompt_tokens={limit}: send token ids.",
            "truncate_prompt_tokens",
            limit,
        )
    return list(cuts.pop())


def render_chat(served: Served, body: TemplateFields, messages: list[dict[str, Any]]) -> str:
    """Render the messages with the chat template; what a request says of the template wins over its free options."""
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        options.setdefault("enable_thinking", body.reasoning_effort != "none")
    for name in ("chat_template", "tools", "documents", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            options[name] = value
    options |= {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
    }
    return served.words.render(flatten_messages(served, messages, body.chat_template), **options)


def encode_chat(served: Served, body: ChatBody, text: str) -> list[int]:
    """Encode a rendered chat and cut it."""
    return _encode(served, body, text, reserved=bool(body.limit))


def flatten_messages(
    served: Served, messages: list[dict[str, Any]], template: str | None = None
) -> list[dict[str, Any]]:
    """Return messages as chat templates expect them.

    Raises:
        Refusal: A content has a part that is not text (400).
    """
    iterates = bool(_ITERATES_PARTS.search(served.words.chat_template(template) or ""))
    return [_flatten(message, place, iterates=iterates) for place, message in enumerate(messages)]


def _flatten(message: dict[str, Any], place: int, *, iterates: bool) -> dict[str, Any]:
    """Return a message with its content as a text, or as text parts, and the arguments of its tool calls as objects."""
    content = message.get("content")
    if content is None:
        message = {**message, "content": ""}
    elif isinstance(content, list):
        texts = [text for part in content if (text := _text_of(part, place)) is not None]
        in_parts = iterates and message.get("role") != "tool"
        shown = [{"type": "text", "text": text} for text in texts] if in_parts else "\n".join(texts)
        message = {**message, "content": shown}
    calls = message.get("tool_calls")
    if message.get("role") == "assistant" and isinstance(calls, list):
        message = {**message, "tool_calls": [_parse_arguments(call, place) for call in calls]}
        if not calls:
            del message["tool_calls"]
    return message


def _text_of(part: object, place: int) -> str | None:
    """Return the text of a part of a content, None for one without."""
    if isinstance(part, str):
        return part
    kind = (part.get("type") or ("text" if "text" in part else None)) if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in TEXT_PARTS:
        shown = repr(kind) if kind else f"of {', '.join(map(str, part))[:60]}" if isinstance(part, dict) else repr(part)
        raise bad_parameter(
            f"topkd serve takes text only, and messages[{place}] has a content part {shown[:100]}: "
            f"send parts of type {', '.join(sorted(TEXT_PARTS))}.",
            "messages",
        )
    text = part.get(TEXT_PARTS[kind])
    if text is not None and not isinstance(text, str):
        raise bad_parameter(f"messages[{place}] has a content part whose text is no string.", "messages")
    return text


def _parse_arguments(call: object, place: int) -> dict[str, Any]:
    """Return a tool call of an earlier turn with its arguments as an object: OpenAI sends them as JSON in a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or call.get("type", "function") != "function":
        raise bad_parameter(f"messages[{place}] has a tool call that is not of type 'function'.", "tool_calls")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {}  # as vLLM: a broken call of an earlier turn must not end the conversation
    shown = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": {**function, "arguments": shown}}
