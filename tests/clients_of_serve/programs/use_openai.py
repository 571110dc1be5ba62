"""What a user of openai-python does with a server; prints what came of it."""

import asyncio
import json
import sys

import openai
from openai import AsyncOpenAI, OpenAI

SAMPLING = {"max_tokens": 12, "seed": 3, "temperature": 1.0}
USER = [{"role": "user", "content": "def get(self):"}]


def completions(client: OpenAI, model: str) -> dict:
    fields = {"model": model, "prompt": "import os\n", "logprobs": 3, "n": 2, **SAMPLING}
    whole = client.completions.create(**fields)
    texts, tokens, ends, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    return {
        "whole": [[c.text, c.logprobs.token_logprobs, c.finish_reason] for c in whole.choices],
        "streamed": [list(row) for row in zip(texts, tokens, ends, strict=True)],
        "usage": [whole.usage.completion_tokens, usage.completion_tokens],
    }


def chats(client: OpenAI, model: str) -> dict:
    fields = {"model": model, "messages": USER, "logprobs": True, "top_logprobs": 3, **SAMPLING}
    whole = client.chat.completions.create(**fields).choices[0]
    text, entries, role = "", [], None
    for chunk in client.chat.completions.create(**fields, stream=True):
        [choice] = chunk.choices
        role = role or choice.delta.role
        text += choice.delta.content or ""
        entries += [entry.model_dump() for entry in choice.logprobs.content] if choice.logprobs else []
    with client.chat.completions.stream(**fields) as events:  # the client's own joining of a stream
        joined = [event.snapshot for event in events if event.type == "content.delta"][-1]
    parts = [{"role": "user", "content": [{"type": "text", "text": USER[0]["content"]}]}]
    return {
        "whole": [whole.message.role, whole.message.content, [entry.model_dump() for entry in whole.logprobs.content]],
        "streamed": [role, text, entries],
        "joined": joined,
        "parts": client.chat.completions.create(**{**fields, "messages": parts}).choices[0].message.content,
    }


def refusals(client: OpenAI, model: str) -> dict:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    chat = {"model": model, "messages": USER}
    asked = {
        "response_format": lambda: client.chat.completions.create(**chat, response_format={"type": "json_object"}),
        "tool_choice": lambda: client.chat.completions.create(**chat, tools=[tool], tool_choice="required"),
        "messages": lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": image}]),
        "max_tokens": lambda: client.chat.completions.create(**chat, max_tokens=100_000),
        "suffix": lambda: client.completions.create(model=model, prompt="a", suffix="b"),
        "structured_outputs": lambda: client.chat.completions.create(
            **chat, extra_body={"structured_outputs": {"regex": "[a"}}
        ),
        "model": lambda: client.completions.create(model="nope", prompt="a"),
        "key": client.with_options(api_key="wrong").models.list,
    }
    found = {}
    for name, ask in asked.items():
        try:
            ask()
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, getattr(error, "param", None)]
    return found


async def leave(url: str, key: str, model: str) -> int:
    """Leave a stream after its first chunks; the number of chunks that were read."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key)
    stream = await client.completions.create(
        model=model, prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    read = 0
    async for _ in stream:
        read += 1
        if read == 3:
            break
    await stream.close()
    await client.close()
    return read


def main() -> None:
    arguments = json.loads(sys.argv[1])
    url, key, model = arguments["url"], arguments["key"], arguments["model"]
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    found = {
        "models": [card.id for card in client.models.list()],
        "completions": completions(client, model),
        "chats": chats(client, model),
        "refusals": refusals(client, model),
        "read": asyncio.run(leave(url, key, model)),
    }
    print(json.dumps(found))


main()
