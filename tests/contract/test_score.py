"""Scoring: every row a server gives for a prompt, against a float64 forward pass over the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.contract.reference import logp_rows, ranks
from tests.contract.servers import Endpoint
from tests.contract.wire import SCORE, complete, generate, token_ids

TOLERANCE = 1e-4


@pytest.mark.parametrize("length", [2, 17, 300, 1000])
def test_every_scored_row_is_the_float64_distribution(server: Endpoint, length: int):
    k = 20
    ids = token_ids(length, seed=length)
    exact = logp_rows(server.model_dir, ids)
    [choice] = complete(server, ids, prompt_logprobs=k, **SCORE)
    rows = choice["prompt_logprobs"]
    assert len(rows) == length
    assert rows[0] is None, "nothing predicts token 0"
    for position, row in enumerate(rows[1:], start=1):
        truth = exact[position - 1]
        listed = {int(key): entry["logprob"] for key, entry in row.items()}
        for token, logp in listed.items():
            assert logp == pytest.approx(truth[token], abs=TOLERANCE)
        top = {token for token, entry in zip(listed, row.values(), strict=True) if entry["rank"] <= k}
        # Two ids closer than the servers' float32 noise may change places at the edge of the list.
        edge = np.sort(truth)[-k]
        assert {int(t) for t in np.flatnonzero(truth > edge + TOLERANCE)} <= top
        assert all(truth[t] > edge - TOLERANCE for t in top)
        assert ids[position] in listed


def test_the_realised_token_comes_first_and_makes_k_plus_one_when_it_is_outside_the_list(server: Endpoint):
    k = 5
    unlikely = token_ids(40, seed=5)
    likely = complete(server, unlikely[:8], max_tokens=12, temperature=0, return_token_ids=True)[0]["token_ids"]
    ids = unlikely[:8] + likely + unlikely[8:]
    exact = logp_rows(server.model_dir, ids)
    [choice] = complete(server, ids, prompt_logprobs=k, **SCORE)
    sizes = set()
    for position, row in enumerate(choice["prompt_logprobs"][1:], start=1):
        actual = ids[position]
        assert int(next(iter(row))) == actual, "the realised token is the first key, whatever its rank"
        entries = list(row.values())
        rank = int(ranks(exact[position - 1])[actual])
        assert entries[0]["rank"] == rank
        inside = rank <= k
        assert len(row) == (k if inside else k + 1)
        rest = [entry["rank"] for entry in entries[1:]]
        assert rest == [r for r in range(1, k + 1) if not (inside and r == rank)]
        sizes.add(len(row))
    assert sizes == {k, k + 1}, "the prompt must show both cases"


def test_prompt_logprobs_zero_gives_the_realised_token_alone(server: Endpoint):
    ids = token_ids(12, seed=6)
    exact = logp_rows(server.model_dir, ids)
    [choice] = complete(server, ids, prompt_logprobs=0, **SCORE)
    for position, row in enumerate(choice["prompt_logprobs"][1:], start=1):
        [(key, entry)] = row.items()
        assert int(key) == ids[position]
        assert entry["logprob"] == pytest.approx(exact[position - 1, ids[position]], abs=TOLERANCE)


def test_the_mass_of_a_row_never_exceeds_one_and_the_tail_is_what_float64_says(server: Endpoint):
    k = server.max_logprobs
    ids = token_ids(30, seed=7)
    exact = logp_rows(server.model_dir, ids)
    [choice] = complete(server, ids, prompt_logprobs=k, **SCORE)
    for position, row in enumerate(choice["prompt_logprobs"][1:], start=1):
        mass = sum(np.exp(entry["logprob"]) for entry in row.values() if entry["rank"] <= k)
        assert mass == pytest.approx(np.exp(np.sort(exact[position - 1])[-k:]).sum(), abs=1e-4)
        assert mass <= 1 + 1e-5


def test_scoring_ignores_temperature_and_truncation(server: Endpoint):
    ids = token_ids(15, seed=8)
    plain, heated = (
        complete(server, ids, max_tokens=1, prompt_logprobs=5, **sampling)[0]["prompt_logprobs"]
        for sampling in ({"temperature": 1.0}, {"temperature": 0.5, "top_k": 2, "top_p": 0.5})
    )
    for row, other in zip(plain[1:], heated[1:], strict=True):
        assert {key: entry["rank"] for key, entry in row.items()} == {
            key: entry["rank"] for key, entry in other.items()
        }
        for key, entry in row.items():
            assert other[key]["logprob"] == pytest.approx(entry["logprob"], abs=1e-5)


def test_a_batch_of_prompts_gives_each_its_own_rows_in_order(server: Endpoint):
    prompts = [token_ids(n, seed=n) for n in (3, 31, 2, 9)]
    choices = complete(server, prompts, prompt_logprobs=3, **SCORE)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for ids, choice in zip(prompts, choices, strict=True):
        assert choice["prompt_token_ids"] == ids
        exact = logp_rows(server.model_dir, ids)
        assert [int(next(iter(row))) for row in choice["prompt_logprobs"][1:]] == ids[1:]
        for position, row in enumerate(choice["prompt_logprobs"][1:], start=1):
            for key, entry in row.items():
                assert entry["logprob"] == pytest.approx(exact[position - 1, int(key)], abs=TOLERANCE)


def test_text_never_crosses_ids_that_do_not_survive_detokenising_are_scored_as_sent(server: Endpoint):
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    ids = token_ids(64, seed=9)
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids, "the premise of this test"
    [choice] = complete(server, ids, prompt_logprobs=8, **SCORE)
    assert choice["prompt_token_ids"] == ids
    exact = logp_rows(server.model_dir, ids)
    collided = 0
    for position, row in enumerate(choice["prompt_logprobs"][1:], start=1):
        assert ids[position] == int(next(iter(row)))
        texts = [entry["decoded_token"] for entry in row.values()]
        collided += len(set(texts)) < len(texts)
        for key, entry in row.items():
            assert entry["logprob"] == pytest.approx(exact[position - 1, int(key)], abs=TOLERANCE)
    assert collided, "some row must hold two ids with one text: keyed by text it would lose mass"


def test_generate_scores_the_same_rows_without_detokenising(server: Endpoint):
    ids = token_ids(33, seed=10)
    by_completions = complete(server, ids, prompt_logprobs=6, **SCORE)[0]["prompt_logprobs"]
    body = generate(server, ids, temperature=0, prompt_logprobs=6, detokenize=False)
    assert body["prompt_logprobs"][0] is None
    for mine, other in zip(body["prompt_logprobs"][1:], by_completions[1:], strict=True):
        assert list(mine) == list(other), "same ids in the same order"
        assert all(entry["decoded_token"] is None for entry in mine.values())
        for key, entry in mine.items():
            assert entry["rank"] == other[key]["rank"]
            assert entry["logprob"] == pytest.approx(other[key]["logprob"], abs=1e-5)


def test_echo_scores_the_prompt_with_no_generated_token(server: Endpoint):
    k = 4
    ids = token_ids(11, seed=11)
    exact = logp_rows(server.model_dir, ids)
    [choice] = complete(
        server, ids, echo=True, max_tokens=0, temperature=0, logprobs=k, return_tokens_as_token_ids=True
    )
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in ids]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for position in range(1, len(ids)):
        assert logprobs["token_logprobs"][position] == pytest.approx(exact[position - 1, ids[position]], abs=TOLERANCE)
        for key, logp in logprobs["top_logprobs"][position].items():
            assert logp == pytest.approx(exact[position - 1, int(key.removeprefix("token_id:"))], abs=TOLERANCE)
