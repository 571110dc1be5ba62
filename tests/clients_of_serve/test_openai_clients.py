"""openai-python and litellm do with `topkd serve` what they do with a real vLLM."""

from __future__ import annotations

import time

import pytest

from tests.clients_of_serve.conftest import API_KEY, Program
from tests.contract.servers import Endpoint

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def test_openai_completes_chats_and_streams(server: Endpoint, run: Program):
    found = run("use_openai", url=server.url, key=API_KEY, model=server.model)
    assert found["models"] == ["tiny"]
    completions = found["completions"]
    assert completions["streamed"] == completions["whole"]
    assert completions["whole"][0] != completions["whole"][1], "two choices are two draws"
    whole, streamed = completions["usage"]
    assert whole == streamed > 0
    chats = found["chats"]
    assert chats["streamed"] == chats["whole"]
    assert chats["whole"][0] == "assistant"
    assert chats["joined"] == chats["parts"] == chats["whole"][1]
    assert found["refusals"] == {
        "response_format": ["BadRequestError", "response_format"],
        "tool_choice": ["BadRequestError", "tool_choice"],
        "messages": ["BadRequestError", "messages"],
        "max_tokens": ["BadRequestError", "max_tokens"],
        "suffix": ["BadRequestError", "suffix"],
        "structured_outputs": ["BadRequestError", "structured_outputs"],
        "model": ["NotFoundError", "model"],
        "key": ["AuthenticationError", None],
    }
    assert found["read"] == 3
    _wait_until_idle(server)


def _wait_until_idle(server: Endpoint) -> None:
    deadline = time.monotonic() + 60
    with server.http() as http:
        while http.get("/load").json() != {"server_load": 0}:
            assert time.monotonic() < deadline, "a stream that its client left goes on"
            time.sleep(0.05)


def test_litellm_completes_chats_and_streams(server: Endpoint, run: Program):
    found = run("use_litellm", url=server.url, key=API_KEY, model=server.model)
    assert found["streamed"] == found["whole"]
    assert found["whole"][1:] == ["length", 12]
    assert found["chunks"] > 3
    assert "".join(found["pieces"]) == found["plain"]
    assert len(found["pieces"]) > 3
    assert "`response_format` is not supported by topkd serve" in found["refused"]
