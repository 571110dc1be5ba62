"""Limits and errors: what a server refuses, with which status and in which words."""

from __future__ import annotations

import re

import pytest

from tests.contract.conftest import API_KEY
from tests.contract.servers import Endpoint
from tests.contract.wire import SCORE, complete, get, post, refused, token_ids


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (
            "/v1/completions",
            {"prompt": [9, 10, 11], "max_tokens": 1, "prompt_logprobs": 65},
            "Requested prompt logprobs of 65",
        ),
        (
            "/v1/completions",
            {"prompt": [9, 10, 11], "max_tokens": 1, "logprobs": 65},
            "Requested sample logprobs of 65",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": True, "top_logprobs": 65},
            "Requested sample logprobs of 65",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [9, 10], "sampling_params": {"max_tokens": 1, "prompt_logprobs": 65}},
            "Requested prompt logprobs of 65",
        ),
    ],
)
def test_k_above_the_limit_is_refused_with_the_limit_in_the_message(
    server: Endpoint, path: str, fields: dict, words: str
):
    error = refused(server, path, {"model": server.model, **fields})
    assert error["type"] == "BadRequestError"
    assert words in error["message"]
    assert re.search(r"greater than max allowed: (\d+)", error["message"])[1] == str(server.max_logprobs)


def test_k_at_the_limit_is_served(server: Endpoint):
    [choice] = complete(server, token_ids(3), prompt_logprobs=server.max_logprobs, **SCORE)
    assert {entry["rank"] for entry in choice["prompt_logprobs"][1].values()} >= set(range(1, server.max_logprobs + 1))


def test_a_prompt_needs_room_for_one_token(server: Endpoint):
    full = token_ids(server.max_model_len)
    [choice] = complete(server, full[:-1], max_tokens=1, temperature=0, prompt_logprobs=0)
    assert len(choice["prompt_logprobs"]) == server.max_model_len - 1
    # The server first cuts max_tokens down to the room that is left, then finds none: a context limit in other words.
    body = {"model": server.model, "prompt": full, "max_tokens": 1}
    assert "max_tokens must be at least 1, got 0" in refused(server, "/v1/completions", body)["message"]
    error = refused(server, "/v1/completions", {**body, "prompt": [*full, 9]})
    assert f"maximum context length is {server.max_model_len} tokens" in error["message"]
    for ids in (full, [*full, 9]):
        generate = {"model": server.model, "token_ids": ids, "sampling_params": {"max_tokens": 1}}
        error = refused(server, "/inference/v1/generate", generate)
        assert f"longer than the maximum model length of {server.max_model_len}" in error["message"]


def test_max_tokens_is_cut_to_the_room_left_without_a_word(server: Endpoint):
    prompt = token_ids(server.max_model_len - 3)
    [choice] = complete(server, prompt, max_tokens=50, temperature=0, return_token_ids=True, ignore_eos=True)
    assert len(choice["token_ids"]) == 3
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate"])
def test_an_unknown_model_is_a_404_that_names_it(server: Endpoint, path: str):
    bodies = {
        "/v1/completions": {"prompt": [9]},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/inference/v1/generate": {"token_ids": [9], "sampling_params": {"max_tokens": 1}},
    }
    error = refused(server, path, {"model": "nobody", "max_tokens": 1, **bodies[path]})
    assert error["code"] == 404
    assert error["type"] == "NotFoundError"
    assert "The model `nobody` does not exist" in error["message"]


@pytest.mark.parametrize("token", [2048, 1_000_000])
def test_an_id_outside_the_vocabulary_is_refused_never_clamped(server: Endpoint, token: int):
    error = refused(server, "/v1/completions", {"model": server.model, "prompt": [9, token], "max_tokens": 1})
    assert error["message"] == f"Token id {token} is out of vocabulary"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [9, -1]},
        {"prompt": {"a": 1}},
        {"prompt": [9], "max_tokens": "x"},
        {"prompt": [9], "max_tokens": 0},
        {"prompt": [9], "temperature": -1},
        {"prompt": [9], "top_p": 0},
        {"prompt": [9], "n": 0},
        {"prompt": [9], "stream": True, "prompt_logprobs": 1},
        {"prompt": []},
    ],
    ids=lambda fields: " ".join(f"{key}={value}" for key, value in fields.items()),
)
def test_a_malformed_request_is_a_400_with_a_message(server: Endpoint, fields: dict):
    error = refused(server, "/v1/completions", {"model": server.model, "max_tokens": 1, **fields})
    assert error["code"] == 400
    assert error["message"]


def test_one_bad_prompt_fails_its_whole_batch(server: Endpoint):
    body = {"model": server.model, "prompt": [[9, 10], [9, 5000]], "max_tokens": 1, "prompt_logprobs": 1}
    assert "Token id 5000" in refused(server, "/v1/completions", body)["message"]


def test_an_unknown_field_is_ignored_so_a_200_proves_nothing(server: Endpoint):
    [choice] = complete(
        server, [9, 10, 11], max_tokens=1, temperature=0, prompt_logprob_token_ids=[[5], [5]], no_such=1
    )
    assert choice["prompt_logprobs"] is None
    assert "prompt_token_id_logprobs" not in choice


def test_a_wrong_path_is_a_404_and_the_server_says_what_it_is(server: Endpoint):
    assert post(server, "/v1/nope", {"model": server.model}).status_code == 404
    assert re.fullmatch(r"\d+\.\d+.*", get(server, "/version").json()["version"])
    [model] = [card for card in get(server, "/v1/models").json()["data"] if card["id"] == server.model]
    assert model["max_model_len"] == server.max_model_len
    assert get(server, "/health").status_code == 200


def test_the_api_key_guards_scoring_and_generation_but_not_health(guarded: Endpoint):
    routes = {
        "/v1/completions": {"prompt": [9], "max_tokens": 1},
        "/inference/v1/generate": {"token_ids": [9], "sampling_params": {"max_tokens": 1}},
    }
    for path, body in routes.items():
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {API_KEY}"}):
            reply = post(guarded, path, {"model": guarded.model, **body}, headers=headers)
            assert reply.status_code == 401
            assert reply.json() == {"error": "Unauthorized"}, "a string, not the usual envelope"
        assert post(guarded, path, {"model": guarded.model, **body}).status_code == 200
    with guarded.http(headers={}) as stranger:
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/v1/models").status_code == 401


def test_the_server_never_writes_its_api_key_to_the_log(guarded: Endpoint):
    complete(guarded, [9, 10], max_tokens=1)
    assert API_KEY not in guarded.log.read_text(errors="replace")
