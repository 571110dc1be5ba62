"""Sampling: reported logprobs are those the token was drawn with, and scoring the sequence gives them again."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.reference import logp_rows
from tests.contract.servers import Endpoint
from tests.contract.wire import SCORE, complete, generate, is_at_least, token_ids

SAMPLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "return_token_ids": True, "ignore_eos": True}
TOLERANCE = 1e-4


def _logps(choice: dict) -> list[float]:
    return choice["logprobs"]["token_logprobs"]


def test_sampled_logprobs_equal_the_scoring_of_the_sampled_sequence(server: Endpoint):
    prompt = token_ids(10, seed=20)
    [drawn] = complete(server, prompt, max_tokens=24, seed=5, logprobs=0, **SAMPLE)
    assert len(drawn["token_ids"]) == len(_logps(drawn)) == 24
    full = prompt + drawn["token_ids"]
    rows = complete(server, full, prompt_logprobs=1, **SCORE)[0]["prompt_logprobs"][len(prompt) :]
    exact = logp_rows(server.model_dir, full)
    for offset, (token, logp) in enumerate(zip(drawn["token_ids"], _logps(drawn), strict=True)):
        assert rows[offset][str(token)]["logprob"] == pytest.approx(logp, abs=TOLERANCE)
        assert logp == pytest.approx(exact[len(prompt) - 1 + offset, token], abs=TOLERANCE)


def test_sampling_gives_the_top_k_beside_the_sampled_token(server: Endpoint):
    k = 6
    prompt = token_ids(9, seed=21)
    [drawn] = complete(server, prompt, max_tokens=64, seed=3, logprobs=k, return_tokens_as_token_ids=True, **SAMPLE)
    exact = logp_rows(server.model_dir, prompt + drawn["token_ids"])[len(prompt) - 1 :]
    seen = set()
    for row, token, listed in zip(exact, drawn["token_ids"], drawn["logprobs"]["top_logprobs"], strict=False):
        ids = {int(key.removeprefix("token_id:")): logp for key, logp in listed.items()}
        assert set(ids) == set(np.argsort(-row)[:k].tolist()) | {token}
        for key, logp in ids.items():
            assert logp == pytest.approx(row[key], abs=TOLERANCE)
        seen.add(len(ids))
    assert seen == {k, k + 1}, "the draw must show a token inside and one outside the list"


def test_raw_logprobs_do_not_follow_the_temperature(server: Endpoint):
    prompt = token_ids(9, seed=22)
    cold = {**SAMPLE, "temperature": 0.7, "top_k": 8}
    [drawn] = complete(server, prompt, max_tokens=12, seed=3, logprobs=0, **cold)
    exact = logp_rows(server.model_dir, prompt + drawn["token_ids"])[len(prompt) - 1 :]
    assert _logps(drawn) == pytest.approx(
        [row[t] for row, t in zip(exact, drawn["token_ids"], strict=False)], abs=TOLERANCE
    )
    assert all(token in np.argsort(-row)[:8] for row, token in zip(exact, drawn["token_ids"], strict=False))


def test_the_first_token_is_drawn_from_the_policy_itself(server: Endpoint):
    """512 draws: the mean logprob is minus the entropy, and the likely tokens come as often as they should."""
    n = 512
    prompt = token_ids(7, seed=23)
    row = logp_rows(server.model_dir, prompt)[-1]
    p = np.exp(row)
    choices = complete(server, prompt, n=n, max_tokens=1, seed=11, logprobs=0, **SAMPLE)
    tokens = np.array([choice["token_ids"][0] for choice in choices])
    entropy, spread = -(p * row).sum(), np.sqrt((p * row**2).sum() - (p * row).sum() ** 2)
    assert abs(np.mean([_logps(choice)[0] for choice in choices]) + entropy) < 5 * spread / np.sqrt(n)
    for token in np.argsort(-p)[:4]:
        expected = n * p[token]
        assert abs((tokens == token).sum() - expected) < 5 * np.sqrt(expected * (1 - p[token]))


def test_a_seed_repeats_a_draw_and_another_seed_does_not(server: Endpoint):
    prompt = token_ids(8, seed=24)
    first, again, other = (
        complete(server, prompt, max_tokens=16, seed=seed, **SAMPLE)[0]["token_ids"] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_n_choices_of_a_batch_are_grouped_by_prompt_and_numbered(server: Endpoint):
    prompts = [token_ids(4, seed=25), token_ids(6, seed=26)]
    choices = complete(server, prompts, n=3, max_tokens=4, seed=9, logprobs=0, **SAMPLE)
    assert [choice["index"] for choice in choices] == list(range(6))
    for choice in choices:
        prompt = prompts[choice["index"] // 3]
        exact = logp_rows(server.model_dir, prompt + choice["token_ids"])[len(prompt) - 1 :]
        wanted = [row[t] for row, t in zip(exact, choice["token_ids"], strict=False)]
        assert _logps(choice) == pytest.approx(wanted, abs=TOLERANCE)


def test_the_stop_token_is_kept_and_scored(server: Endpoint):
    prompt = token_ids(8, seed=27)
    greedy = {"temperature": 0, "return_token_ids": True, "logprobs": 0, "ignore_eos": True}
    [whole] = complete(server, prompt, max_tokens=8, **greedy)
    stop = next(token for i, token in enumerate(whole["token_ids"]) if i and token not in whole["token_ids"][:i])
    [choice] = complete(server, prompt, max_tokens=8, stop_token_ids=[stop], **greedy)
    ended = whole["token_ids"].index(stop) + 1
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert choice["token_ids"] == whole["token_ids"][:ended]
    assert _logps(choice) == pytest.approx(_logps(whole)[:ended], abs=TOLERANCE)
    assert whole["finish_reason"] == "length"


@pytest.mark.vllm
@pytest.mark.slow
def test_completions_name_the_weights_of_their_tokens_where_asked_since_033(vllm: Endpoint):
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    [asked] = complete(vllm, [9, 10], return_weight_versions=True, **fields)
    [unasked] = complete(vllm, [9, 10], **fields)
    if is_at_least(vllm, 33):
        assert asked["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
        assert unasked["weight_versions"] is None
    else:
        assert "weight_versions" not in asked, "ignored with a 200"


def test_generate_samples_tokens_in_and_out_with_the_weights_version(server: Endpoint):
    prompt = token_ids(9, seed=28)
    body = generate(server, prompt, max_tokens=6, temperature=0, logprobs=2, detokenize=False, ignore_eos=True)
    [choice] = body["choices"]
    [by_completions] = complete(server, prompt, max_tokens=6, temperature=0, return_token_ids=True, ignore_eos=True)
    assert choice["token_ids"] == by_completions["token_ids"]
    exact = logp_rows(server.model_dir, prompt + choice["token_ids"])[len(prompt) - 1 :]
    for row, token, entry in zip(exact, choice["token_ids"], choice["logprobs"]["content"], strict=False):
        assert entry["token_id"] == token
        assert entry["logprob"] == pytest.approx(row[token], abs=TOLERANCE)
        assert entry["rank"] == 1
    [version] = choice["weight_versions"]
    assert version == {"version": "default", "start": 0, "end": 6}
