"""A field that changes the answer is obeyed or refused with 400, never ignored; of SGLang see ``test_sglang``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.serve.apps import NAME, client, complete, generate, post, random_ids
from topkd.serve.routes.requests import CompletionBody

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


async def _refusal(app: Starlette, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client(app) as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 400, reply.text[:300]
    return dict(reply.json()["error"])


async def _chat(app: Starlette, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "messages": messages, "max_tokens": 1, "return_token_ids": True, **fields}
    return await post(app, "/v1/chat/completions", body)


EITHER = [
    ("response_format", {"type": "json_object"}, {"type": "text"}),
    ("response_format", SCHEMA, None),
    ("structured_outputs", {"regex": "[unclosed"}, None),
    ("structured_outputs", {"choice": ["a", "b"]}, None),
    ("guided_json", {"type": "object"}, None),
    ("guided_regex", "a+", None),
    ("guided_choice", ["a"], []),
    ("guided_grammar", "root ::= x", None),
    ("use_beam_search", True, False),
    ("best_of", 2, 1),
    ("bad_words", ["a"], []),
    ("logits_processors", ["x"], None),
    ("thinking_token_budget", 4, -1),
    ("repetition_detection", {"max_pattern_size": 3, "min_count": 2}, None),
    ("priority", 3, 0),
]
COMPLETION = [("suffix", "end", None), ("prompt_embeds", "AAAA", None)]
CHAT = [
    ("echo", True, False),
    ("functions", [{"name": "add"}], None),
    ("function_call", {"name": "add"}, "none"),
    ("mm_processor_kwargs", {"a": 1}, None),
    ("media_io_kwargs", {"image": {}}, {}),
]


@pytest.mark.parametrize(("field", "value", "neutral"), [*EITHER, *COMPLETION])
async def test_a_completion_with_a_field_that_is_not_done_is_refused_by_name(
    app: Starlette, field: str, value: object, neutral: object
):
    error = await _refusal(app, "/v1/completions", {"model": NAME, "prompt": [9, 10], field: value})
    assert (error["param"], error["code"]) == (field, 400)
    assert f"`{field}` is not supported by topkd serve" in error["message"]
    same = {"seed": 4, "max_tokens": 3}
    assert await complete(app, [9, 10], **same, **{field: neutral}) == await complete(app, [9, 10], **same)


@pytest.mark.parametrize(("field", "value", "neutral"), [*EITHER, *CHAT])
async def test_a_chat_with_a_field_that_is_not_done_is_refused_by_name(
    app: Starlette, field: str, value: object, neutral: object
):
    error = await _refusal(app, "/v1/chat/completions", {"model": NAME, "messages": [USER], field: value})
    assert error["param"] == field
    replies = [await _chat(app, [USER], seed=4, **extra) for extra in ({}, {field: neutral})]
    assert replies[0]["choices"] == replies[1]["choices"]


@pytest.mark.parametrize(
    ("body", "sampling", "param"),
    [
        ({}, {"structured_outputs": {"json": {"type": "object"}}}, "structured_outputs"),
        ({}, {"bad_words": ["a"]}, "bad_words"),
        ({}, {"trace_decode_token_ids": [5]}, "trace_decode_token_ids"),
        ({"features": {"mm_hashes": {}}}, {}, "features"),
        ({"content_parts": [{"type": "image_url", "url": "x"}]}, {}, "content_parts"),
        ({"stream": True}, {}, "stream"),
        ({}, {"skip_special_tokens": False, "spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ],
)
async def test_a_generate_request_with_a_field_that_is_not_done_is_refused_by_name(
    app: Starlette, body: dict, sampling: dict, param: str
):
    error = await _refusal(app, "/inference/v1/generate", {"token_ids": [9, 10], "sampling_params": sampling, **body})
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"sampling_params": {"stop": "a", "detokenize": False}},
            "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
        ),
        (
            {"sampling_params": {"detokenize": False}, "output_mode": "text"},
            "output_mode='text' requires sampling_params.detokenize to be true",
        ),
    ],
)
async def test_texts_without_decoding_are_refused_as_in_vllm(app: Starlette, body: dict, words: str):
    error = await _refusal(app, "/inference/v1/generate", {"token_ids": [9, 10], **body})
    assert words in error["message"]


CONTEXT = "max_tokens=5000 cannot be greater than max_model_len=4096. Please request fewer output tokens."


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("completions", {"max_tokens": 5000}, f"{CONTEXT} (parameter=max_tokens, value=5000)"),
        ("chat/completions", {"max_tokens": 5000}, f"{CONTEXT} (parameter=max_tokens, value=5000)"),
        ("chat/completions", {"max_completion_tokens": 5000}, CONTEXT.replace("max_tokens", "max_completion_tokens")),
        ("completions", {"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens=5000 cannot be greater than"),
        ("completions", {"truncate_prompt_tokens": 0}, "The decoder prompt cannot be empty"),
        ("completions", {"logprob_token_ids": [5]}, "when using `logprob_token_ids`, `logprobs` must be set."),
        ("completions", {"logprobs": 1, "logprob_token_ids": list(range(129))}, "greater than max allowed: 128"),
        (
            "completions",
            {"logprobs": 1, "logprob_token_ids": [5], "echo": True, "max_tokens": 0},
            "`logprob_token_ids` is not supported when `echo=True` and `max_tokens=0`",
        ),
        ("chat/completions", {"logprob_token_ids": [5]}, "when using `logprob_token_ids`, `logprobs` must be set to"),
        ("completions", {"stop": ["a", ""]}, "stop cannot contain an empty string."),
        ("completions", {"allowed_token_ids": []}, "allowed_token_ids is not None and empty!"),
        ("completions", {"stop_token_ids": [999_999]}, "stop_token_ids contains out-of-vocab token id 999999."),
        ("chat/completions", {"tools": []}, "`tools` must not be an empty array."),
        ("chat/completions", {"tool_choice": "auto"}, "When using `tool_choice`, `tools` must be set."),
        ("chat/completions", {"tools": [TOOL]}, 'tool_choice="auto" is not supported by topkd serve'),
        ("chat/completions", {"tools": [TOOL], "tool_choice": "required"}, 'tool_choice="required" is not supported'),
        (
            "chat/completions",
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            'tool_choice=function "add" is not supported by topkd serve',
        ),
    ],
)
async def test_values_that_cannot_be_obeyed_are_refused_in_words(app: Starlette, path: str, fields: dict, words: str):
    prompt = {"messages": [USER]} if path.startswith("chat") else {"prompt": [9, 10]}
    error = await _refusal(app, f"/v1/{path}", {"model": NAME, **prompt, **fields})
    assert words in error["message"]


async def test_tools_that_may_not_be_called_are_shown_to_the_template(app: Starlette):
    template = "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}{{ messages[0].content }}"
    fields = {"chat_template": template, "return_prompt_text": True}
    shown = await _chat(app, [USER], tools=[TOOL], tool_choice="none", **fields)
    assert shown["prompt_text"] == "<add>x"
    assert (await _chat(app, [USER], tool_choice="none", **fields))["prompt_text"] == "x"


async def test_content_as_text_parts_reads_as_the_same_text(app: Starlette):
    plain = await _chat(app, [{"role": "user", "content": "a\nb"}])
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert (await _chat(app, [{"role": "user", "content": parts}]))["prompt_token_ids"] == plain["prompt_token_ids"]
    # A template that goes through the parts itself is given them.
    template = "{% for m in messages %}{% for part in m['content'] %}<{{ part.text }}>{% endfor %}{% endfor %}"
    fields = {"chat_template": template, "return_prompt_text": True}
    assert (await _chat(app, [{"role": "user", "content": parts}], **fields))["prompt_text"] == "<a><b>"


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "'image_url'"),
        ({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, "'input_audio'"),
        ({"type": "video_url", "video_url": {"url": "http://x"}}, "'video_url'"),
        ({"image_url": "http://x"}, "of image_url"),
        (7, "7"),
    ],
)
async def test_a_part_that_is_no_text_is_refused_by_its_type(app: Starlette, part: object, named: str):
    content = [{"type": "text", "text": "look:"}, part]
    body = {"model": NAME, "messages": [USER, {"role": "user", "content": content}]}
    error = await _refusal(app, "/v1/chat/completions", body)
    assert f"messages[1] has a content part {named}" in error["message"]
    assert error["param"] == "messages"


async def test_the_template_sees_earlier_tool_calls_as_objects_and_no_content_as_an_empty_text(app: Starlette):
    def call(arguments: object) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}

    template = (
        "{% for m in messages %}[{{ m.content }}]{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}'), call("broken"), call(None)]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]},
    ]
    reply = await _chat(app, messages, chat_template=template, return_prompt_text=True)
    assert reply["prompt_text"] == '[]{"a": 1}{}{}[2]'


async def test_documents_and_reasoning_effort_reach_the_template(app: Starlette):
    template = "{{ documents[0].text }}|{{ reasoning_effort }}|{{ enable_thinking }}|{{ add_generation_prompt }}"
    fields = {"documents": [{"text": "d"}], "reasoning_effort": "none"}
    reply = await _chat(app, [USER], chat_template=template, return_prompt_text=True, **fields)
    assert reply["prompt_text"] == "d|none|False|True"


async def test_a_message_that_is_continued_keeps_its_role(app: Starlette):
    fields = {"add_generation_prompt": False, "chat_template": "{{ messages[-1].content }}"}
    reply = await _chat(app, [USER], **fields)
    assert reply["choices"][0]["message"]["role"] == "user"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(7, 10)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": 30}, slice(0, 10)),
        ({"truncate_prompt_tokens": -1}, slice(0, 10)),
    ],
)
async def test_a_cut_prompt_is_scored_as_the_shorter_prompt(app: Starlette, fields: dict, kept: slice):
    ids = random_ids(10, seed=3)
    [choice] = await complete(app, ids, prompt_logprobs=2, return_token_ids=True, temperature=0, **fields)
    [want] = await complete(app, ids[kept], prompt_logprobs=2, return_token_ids=True, temperature=0)
    assert choice == want
    assert choice["prompt_token_ids"] == ids[kept]


async def test_a_prompt_beyond_the_context_is_cut_to_leave_room_for_one_token(app: Starlette):
    ids = random_ids(5000, seed=3)
    [choice] = await complete(app, ids, truncate_prompt_tokens=-1, return_token_ids=True)
    assert choice["prompt_token_ids"] == ids[-4095:]


async def test_a_cut_text_keeps_the_special_tokens_of_its_tokenizer(app: Starlette, monkeypatch: pytest.MonkeyPatch):
    words = app.state.served.words
    encode = words.encode
    monkeypatch.setattr(
        words,
        "encode",
        lambda text, *, add_special_tokens: [1, *encode(text, add_special_tokens=False)][not add_special_tokens :],
    )
    plain = encode("one two three four five", add_special_tokens=False)
    cut = {"truncate_prompt_tokens": 3, "return_token_ids": True}
    [choice] = await complete(app, "one two three four five", **cut)
    assert choice["prompt_token_ids"] == [1, *plain[-2:]]
    # With a side of its own a request has the ids cut, whatever they are.
    [choice] = await complete(app, "one two three four five", truncation_side="left", **cut)
    assert choice["prompt_token_ids"] == plain[-3:]


@pytest.mark.parametrize(
    ("whole", "plain", "cut", "words"),
    [
        ([11, 15, 16, 17], [19, 16, 17], 3, "special tokens cannot be told apart"),  # the prefix joins the first token
        ([11, 12, 11, 12, 11, 12], [11, 12, 11, 12], 3, "special tokens cannot be told apart"),  # in two places
        ([1, 15, 16, 2], [15, 16], 1, "truncate_prompt_tokens=1 leaves no room for the 2 special tokens"),
        ([1, 15, 16, 2], [15, 16], 0, "truncate_prompt_tokens=0 leaves no room for the 2 special tokens"),
        ([1, 15, 16, 2], [15, 16], 2, [1, 2]),
        ([1, 15, 16, 2], [15, 16], 3, [1, 16, 2]),
        ([15, 15, 15, 15], [15, 15, 15], 2, [15, 15]),  # in two places, with one result
    ],
)
async def test_a_text_is_cut_between_its_special_tokens_or_refused(
    app: Starlette, monkeypatch: pytest.MonkeyPatch, whole: list[int], plain: list[int], cut: int, words: object
):
    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        return whole if add_special_tokens else plain

    monkeypatch.setattr(app.state.served.words, "encode", encode)
    fields = {"prompt": "x", "truncate_prompt_tokens": cut, "return_token_ids": True, "max_tokens": 1}
    if isinstance(words, str):
        error = await _refusal(app, "/v1/completions", {"model": NAME, **fields})
        assert words in error["message"]
        assert error["param"] == "truncate_prompt_tokens"
    else:
        [choice] = await complete(app, **fields)
        assert choice["prompt_token_ids"] == words


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "one {{ messages[0].content }}"},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"tools": [TOOL], "chat_template": "{{ tools[0].function.name }}"},
        {"documents": [{"text": "two"}], "chat_template": "{{ documents[0].text }}"},
        {"chat_template_kwargs": {"mood": "fine"}, "chat_template": "{{ mood }}"},
        {"add_special_tokens": True},
    ],
)
async def test_tokenize_renders_messages_as_a_chat_does(
    app: Starlette, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
):
    words = app.state.served.words
    encode = words.encode
    monkeypatch.setattr(
        words,
        "encode",
        lambda text, *, add_special_tokens: [1, *encode(text, add_special_tokens=False)][not add_special_tokens :],
    )
    shown = await post(app, "/tokenize", {"model": NAME, "messages": [USER], **fields})
    chat = await _chat(app, [USER], **fields, **({"tool_choice": "none"} if "tools" in fields else {}))
    assert shown["tokens"] == chat["prompt_token_ids"]
    assert shown["tokens"] != (await post(app, "/tokenize", {"model": NAME, "messages": [USER]}))["tokens"]


async def test_generate_without_max_tokens_goes_on_to_the_end_of_the_context(app: Starlette):
    ids = random_ids(4060, seed=8)
    reply = await post(
        app, "/inference/v1/generate", {"token_ids": ids, "sampling_params": {"seed": 1, "ignore_eos": True}}
    )
    [choice] = reply["choices"]
    assert len(choice["token_ids"]) == 4096 - 4060
    assert choice["finish_reason"] == "length"


async def test_a_completion_with_null_for_max_tokens_has_sixteen(app: Starlette):
    [choice] = await complete(app, [9, 10], max_tokens=None, ignore_eos=True, return_token_ids=True)
    assert len(choice["token_ids"]) == 16


async def test_special_tokens_are_in_the_text_when_asked_for(app: Starlette):
    words = app.state.served.words
    special = next(token for token in words.tokenizer.all_special_ids if token not in app.state.served.endings.eos)
    fields = {"allowed_token_ids": [special], "max_tokens": 2}
    assert [choice["text"] for choice in await complete(app, [9, 10], **fields)] == [""]
    [choice] = await complete(app, [9, 10], skip_special_tokens=False, **fields)
    assert choice["text"] == 2 * words.alone(special)


async def test_a_token_that_ends_a_draw_is_in_its_text_only_when_asked_for(app: Starlette):
    served = app.state.served
    eos = min(served.endings.eos)
    fields = {"allowed_token_ids": [eos], "skip_special_tokens": False}
    assert [choice["text"] for choice in await complete(app, [9, 10], **fields)] == [""]
    [choice] = await complete(app, [9, 10], include_stop_str_in_output=True, **fields)
    assert choice["text"] == served.words.alone(eos)


async def test_a_stop_string_from_before_min_tokens_ends_nothing(app: Starlette):
    words = app.state.served.words
    [a, b] = [words.encode(text, add_special_tokens=False) for text in ("a", "b")]
    bias = {str(a[0]): 50.0}
    fields = {"max_tokens": 6, "allowed_token_ids": [a[0], b[0]], "stop": ["a"], "logit_bias": bias}
    [choice] = await complete(app, [9, 10], min_tokens=3, **fields)
    assert (choice["text"], choice["stop_reason"]) == ("aaa", "a")
    [choice] = await complete(app, [9, 10], **fields)
    assert (choice["text"], choice["stop_reason"]) == ("", "a")


async def test_of_two_stop_strings_the_first_to_be_complete_counts(app: Starlette):
    words = app.state.served.words
    text = "hello"
    ids = words.encode(text, add_special_tokens=False)
    assert len(ids) == 1 or text.startswith(words.alone(ids[0]))
    fields = {"allowed_token_ids": [ids[0]], "max_tokens": 4}
    begin = words.alone(ids[0])
    [choice] = await complete(app, [9, 10], stop=[2 * begin + "zz", begin[-1]], **fields)
    assert choice["stop_reason"] == begin[-1]
    [choice] = await complete(app, [9, 10], stop=[begin, begin[-1]], **fields)
    assert choice["stop_reason"] == begin


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"temperature": 1e-4}, "temperature", 0.01),
        ({"temperature": 0}, "temperature", 0.0),
        ({"seed": -1}, "seed", None),
        ({"logit_bias": {"5": -1000}}, "logit_bias", ((5, -100.0),)),
    ],
)
def test_values_are_taken_as_vllm_takes_them(fields: dict, attribute: str, value: object):
    body = CompletionBody.model_validate_json(json.dumps({"prompt": [9], **fields}))
    assert getattr(body.sampling(max_tokens=1, logprobs=None, vocab=100), attribute) == value


async def test_null_stands_for_the_default_where_openai_allows_it(app: Starlette):
    nulls = dict.fromkeys(("n", "stop", "seed", "temperature", "logit_bias", "stream", "stream_options"))
    reply = await _chat(app, [USER], top_logprobs=None, tools=None, tool_choice=None, **nulls)
    assert len(reply["choices"]) == 1


async def test_unknown_fields_are_ignored_as_in_vllm(app: Starlette):
    await complete(app, [9, 10], frobnicate=True)
    await generate(app, [9, 10], frobnicate=True)
