"""Request fields that change the answer and that this server does not do: 400, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from topkd.serve.engine.refusal import Refusal, bad_parameter

# Field name -> the values that change nothing, besides null, false, 0 and empty ones.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),  # these five: what vLLM calls structured_outputs from 0.12 on
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json_object": (),
    "functions": (),
    "function_call": ("none",),
    "suffix": (),
    "prompt_embeds": (),
    "echo": (),  # of chat: /v1/completions declares the field
    "use_beam_search": (),
    "best_of": (1,),
    "bad_words": (),
    "logits_processors": (),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "trace_decode_token_ids": (),
    "priority": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "features": (),
    "content_parts": (),
}
SGLANG_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "custom_logit_processor": (),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "input_embeds": (),
    "session_params": (),
}


def refuse_unsupported(fields: BaseModel, unsupported: Mapping[str, tuple[object, ...]] = UNSUPPORTED) -> None:
    """Refuse a request with an unsupported field, unless its value changes nothing.

    Args:
        fields: Keeps the fields that it does not declare, as pydantic's ``extra="allow"`` does.
        unsupported: Those of the route, and their values that change nothing.

    Raises:
        Refusal: 400, naming the field.
    """
    extra = fields.model_extra or {}
    for name in unsupported.keys() & extra.keys():
        value = extra[name]
        if isinstance(value, list):  # of a batch: an item for each prompt
            value = [item for item in value if item not in (None, [])]
        if value and value not in unsupported[name]:
            raise bad_parameter(f"`{name}` is not supported by topkd serve: leave it out.", name)
    if extra.get("spaces_between_special_tokens") is False and not getattr(fields, "skip_special_tokens", True):
        message = "`spaces_between_special_tokens=False` is not supported by topkd serve: leave it out."
        raise bad_parameter(message, "spaces_between_special_tokens")


def refuse_tool_calls(tools: list[dict[str, Any]] | None, choice: object) -> None:
    """Refuse a chat that may call tools: nothing here finds the calls in the text. "none" shows the template the tools.

    Args:
        tools: As sent.
        choice: ``tool_choice``; with tools, vLLM takes "auto" when it is not sent at all.
    """
    if tools == []:
        message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        raise bad_parameter(message, "tools")
    if choice in (None, "none"):
        return
    if not tools:
        raise bad_parameter("When using `tool_choice`, `tools` must be set.", "tool_choice")
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    shown = f'function "{name}"' if isinstance(choice, dict) else f'"{choice}"'
    raise Refusal(
        f"tool_choice={shown} is not supported by topkd serve, which finds no tool calls in a text: "
        'send tool_choice="none" to show the tools to the chat template only. (parameter=tool_choice)',
        param="tool_choice",
    )
