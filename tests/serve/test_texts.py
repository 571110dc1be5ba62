"""Tokens that end inside a character: where their text goes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from tokenizers.decoders import DecodeStream

from tests.serve.apps import NAME, client, complete, make_app, post, random_ids
from topkd.serve.engine.texts import Endings

TEXT = "a – b 🙂 c"


def _endings(app: Starlette, **options: bool) -> Endings:
    served = app.state.served
    return Endings(served.words.tokenizer, served.model, **options)


def test_what_a_text_shows_of_a_growing_completion_is_always_whole_characters(app: Starlette):
    ids = app.state.served.words.encode(TEXT, add_special_tokens=False)
    held = _endings(app)
    shown = [held.text((9, 10), ids[:count]) for count in range(len(ids) + 1)]
    assert shown[-1] == TEXT
    assert all(TEXT.startswith(text) and "\ufffd" not in text for text in shown)
    assert len(set(shown)) < len(shown), "no character here is split"


def test_bytes_that_no_later_token_can_complete_show_as_the_replacement_character(app: Starlette):
    words = app.state.served.words
    begins = words.encode("🙂", add_special_tokens=False)[0]
    after = words.encode("def", add_special_tokens=False)
    assert _endings(app).text((9,), [begins, *after]) == "\ufffddef"
    assert _endings(app).text((9,), [*after, begins]) == "def"
    assert _endings(app, holds_back=False).text((9,), [*after, begins]) == "def\ufffd"


def _streamed(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """What vLLM's detokeniser, the stream of the tokenizers library, shows."""
    stream = DecodeStream(skip_special_tokens=True)
    shown = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in [*prompt, *ids]]
    return "".join(shown[len(prompt) :])


def test_texts_are_those_of_the_detokeniser_in_vllm(app: Starlette):
    words, held, seeded = app.state.served.words, _endings(app), random.Random(5)
    pieces = [words.encode(text, add_special_tokens=False) for text in ("é", "€", "🙂", "漢", " def", "\ufffd")]
    fragments = [token for token in range(2048) if words.alone(token).endswith("\ufffd")]
    unfinished = 0
    for _ in range(300):
        ids: list[int] = []
        for _ in range(seeded.randint(1, 6)):
            ids += seeded.choice([seeded.choice(pieces), [seeded.choice(fragments)], [seeded.randrange(2048)]])
        ids = ids[: seeded.randint(1, len(ids))]
        unfinished += words.decode(ids).endswith("\ufffd")
        prompt = [*random_ids(seeded.randint(1, 8), seed=seeded.randrange(10**6)), 40]
        assert held.text(tuple(prompt), ids) == _streamed(words.tokenizer, prompt, ids)
    assert unfinished > 100


def test_a_prompt_that_ends_inside_a_character_is_not_repeated_in_the_text(app: Starlette):
    words = app.state.served.words
    prompt = words.encode("hello 🙂", add_special_tokens=False)
    completes, after = prompt.pop(), words.encode("def", add_special_tokens=False)
    # vLLM primes its stream with such a prompt in vain, and shows "hello 🙂def". Ours differs on purpose.
    assert _endings(app).text(tuple(prompt), [completes, *after]) == "\ufffddef"


def test_a_token_that_completes_a_character_reads_as_all_of_it(app: Starlette):
    words = app.state.served.words
    ids = words.encode(TEXT, add_special_tokens=False)
    texts = [words.text(token, ids[:place]) for place, token in enumerate(ids)]
    assert "".join(texts) == TEXT
    assert "🙂" in texts
    assert words.text(ids[texts.index("🙂")]) == "", "by itself it is no character"


async def test_replies_name_split_characters_as_they_complete(app: Starlette):
    ids = app.state.served.words.encode(TEXT, add_special_tokens=False)
    [choice] = await complete(app, ids, prompt_logprobs=0)
    texts = [
        row[str(token)]["decoded_token"] for row, token in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
    ]
    assert "a" + "".join(texts) == TEXT


async def test_a_drawn_token_inside_a_character_has_no_text_and_no_bytes(app: Starlette):
    begins = app.state.served.words.encode("🙂", add_special_tokens=False)[0]
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True}
    chat = await post(app, "/v1/chat/completions", {**body, "allowed_token_ids": [begins], "top_logprobs": 1})
    [choice] = chat["choices"]
    assert choice["message"]["content"] == ""
    for entry in choice["logprobs"]["content"]:
        assert (entry["token"], entry["bytes"]) == ("", [])


async def test_sglang_shows_what_it_has_when_a_draw_is_over(models: Path):
    app = make_app(models / "policy", dialect="sglang")
    begins = app.state.served.words.encode("🙂", add_special_tokens=False)[0]
    sampling = {"max_new_tokens": 1, "logit_bias": {str(begins): 100.0}}
    reply = await post(app, "/generate", {"input_ids": [9, 10], "sampling_params": sampling})
    assert reply["output_ids"] == [begins]
    assert reply["text"] == "\ufffd"
    app.state.served.engine.stop()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 2.5}, "temperature must be in [0, 2], got 2.5. (parameter=temperature, value=2.5)"),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2."),
        ({"min_tokens": 3}, "min_tokens must be less than or equal to max_tokens=1, got 3."),
        ({"presence_penalty": 3}, "presence_penalty must be in [-2, 2], got 3.0."),
        ({"prompt": ""}, "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"),
    ],
)
async def test_parameters_that_vllm_refuses_are_refused_in_its_words(app: Starlette, fields: dict, words: str):
    async with client(app) as http:
        reply = await http.post("/v1/completions", json={"model": NAME, "prompt": [9, 10], "max_tokens": 1, **fields})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, words)
