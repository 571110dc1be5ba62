"""What a user of litellm does with a server of vLLM's dialect; prints what came of it."""

import json
import sys

import litellm

SAMPLING = {"max_tokens": 12, "seed": 3, "temperature": 1.0}
USER = [{"role": "user", "content": "def get(self):"}]


def main() -> None:
    arguments = json.loads(sys.argv[1])
    endpoint = {"api_base": f"{arguments['url']}/v1", "api_key": arguments["key"], "num_retries": 0}
    model = f"hosted_vllm/{arguments['model']}"
    chat = {"model": model, "messages": USER, **endpoint, **SAMPLING}
    whole = litellm.completion(**chat)
    chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
    joined = litellm.stream_chunk_builder(chunks, messages=USER)
    text = {"model": f"text-completion-openai/{arguments['model']}", "prompt": "import os\n", **endpoint, **SAMPLING}
    plain = litellm.text_completion(**text)
    pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, stream=True) if chunk.choices]
    try:
        litellm.completion(**chat, response_format={"type": "json_object"})
        refused = None
    except litellm.BadRequestError as error:
        refused = str(error)
    found = {
        "whole": [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens],
        "streamed": [
            joined.choices[0].message.content,
            joined.choices[0].finish_reason,
            joined.usage.completion_tokens,
        ],
        "chunks": len(chunks),
        "plain": plain.choices[0].text,
        "pieces": pieces,
        "refused": refused,
    }
    print(json.dumps(found))


main()
