"""Chat: the template is applied once by the server, and the ids it made are there to be checked."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import post

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import os\n"}]
TOLERANCE = 1e-4


def _chat(server: Endpoint, **fields: object) -> dict:
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": 8, "temperature": 1.0, "seed": 4, **fields}
    reply = post(server, "/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_the_prompt_is_the_chat_template_with_the_generation_prompt(server: Endpoint):
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert _chat(server, return_token_ids=True)["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)


def test_chat_logprobs_are_exact_and_cut_to_k_with_the_sampled_token_first(server: Endpoint):
    k = 3
    body = _chat(server, logprobs=True, top_logprobs=k, return_token_ids=True, return_tokens_as_token_ids=True)
    [choice] = body["choices"]
    prompt, drawn = body["prompt_token_ids"], choice["token_ids"]
    exact = logp_rows(server.model_dir, prompt + drawn)[len(prompt) - 1 :]
    outside = 0
    for row, token, entry in zip(exact, drawn, choice["logprobs"]["content"], strict=False):
        assert entry["token"] == f"token_id:{token}"
        assert entry["logprob"] == pytest.approx(row[token], abs=TOLERANCE)
        listed = [int(top["token"].removeprefix("token_id:")) for top in entry["top_logprobs"]]
        best = np.argsort(-row)[:k].tolist()
        outside += token not in best
        # The k-th best is lost when the sampled token is outside the list: ask for k + 1.
        assert listed == [token, *[t for t in best if t != token]][:k]
        for top in entry["top_logprobs"]:
            assert top["logprob"] == pytest.approx(row[int(top["token"].removeprefix("token_id:"))], abs=TOLERANCE)
    assert outside, "the draw must show a token outside the list"


def test_chat_scores_its_own_prompt(server: Endpoint):
    body = _chat(server, max_tokens=1, prompt_logprobs=2, return_token_ids=True)
    ids = body["prompt_token_ids"]
    exact = logp_rows(server.model_dir, ids)
    assert body["prompt_logprobs"][0] is None
    assert [int(next(iter(row))) for row in body["prompt_logprobs"][1:]] == ids[1:]
    for position, row in enumerate(body["prompt_logprobs"][1:], start=1):
        for key, entry in row.items():
            assert entry["logprob"] == pytest.approx(exact[position - 1, int(key)], abs=TOLERANCE)


def test_bytes_of_a_token_are_its_own_even_inside_a_character(server: Endpoint):
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    body = _chat(server, max_tokens=32, logprobs=True, top_logprobs=8, return_token_ids=True, ignore_eos=True)
    [choice] = body["choices"]
    for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
        text = tokenizer.decode([token])
        if "�" not in text:  # a token that ends inside a character has no text of its own
            assert bytes(entry["bytes"]) == text.encode()
