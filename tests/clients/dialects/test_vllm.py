"""The ``/v1/completions`` dialect: the exact request, the checked reply, the parameters that make a logprob inexact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.dialects.script import Script
from tests.clients.replies import score_body, score_rows
from topkd.clients import ClientConfig, VllmCompletions, connect
from topkd.topk.errors import (
    AlignmentError,
    ConfigError,
    KLimitError,
    ModelNotFoundError,
    ResponseError,
    ServerPausedError,
    TopkdError,
)
from topkd.topk.samples import SamplingParams

FAST = ClientConfig(backoff_s=0.0, pause_timeout_s=0.0)
PROMPT = [5, 6, 7]


def client(*replies, **options) -> tuple[VllmCompletions, Script]:
    script = Script(*replies)
    options = {"model": "t", "config": FAST, **options}
    return VllmCompletions("http://h:8000", transport=script, **options), script


def sampled(*choices: dict[str, Any], **top) -> dict[str, Any]:
    return {"id": "x", "model": "t", "choices": list(choices), **top}


def choice(index: int = 0, ids=(11, 12), logp=(-0.5, -1.25), finish="stop", lists=None, **fields) -> dict[str, Any]:
    return {
        "index": index,
        "text": "ignored",
        "finish_reason": finish,
        "token_ids": list(ids),
        "logprobs": {
            "text_offset": [0] * len(ids),
            "token_logprobs": list(logp),
            "tokens": [f"token_id:{t}" for t in ids],
            "top_logprobs": lists,
        },
        "prompt_logprobs": None,
        **fields,
    }


async def test_a_score_request_is_exactly_this():
    ids, rows = score_rows(8, 3, vocab=100)
    c, script = client((200, score_body(ids, rows)))
    topk = await c.score(ids, 2, 3)
    [request] = script.requests
    assert (request.method, request.url) == ("POST", "http://h:8000/v1/completions")
    assert script.body() == {
        "model": "t",
        "prompt": ids.tolist(),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 3,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    assert (topk.start, topk.rows, topk.k) == (2, 5, 3)
    assert topk.actual_ids.tolist() == ids[3:].tolist()


async def test_a_sampling_request_says_every_parameter():
    params = SamplingParams(max_tokens=9, stop_token_ids=(2, 3), seed=17)
    c, script = client((200, sampled(choice())))
    await c.sample(PROMPT, 1, params)
    assert script.body() == {
        "model": "t",
        "prompt": PROMPT,
        "n": 1,
        "max_tokens": 9,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
        "stop_token_ids": [2, 3],
        "ignore_eos": True,  # the ids above are the only ends
        "seed": 17,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "return_weight_versions": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


async def test_rollouts_come_by_index_with_exact_logprobs_and_their_version():
    c, _ = client(
        (
            200,
            sampled(
                choice(
                    1, ids=(9,), logp=(-2.0,), finish="length", weight_versions=[{"version": "7"}, {"version": "8"}]
                ),
                choice(0, weight_versions=[{"version": 7, "start": 0, "end": 2}]),
            ),
        )
    )
    first, second = await c.sample(PROMPT, 2, SamplingParams(max_tokens=4, seed=1))
    assert first.completion_ids.tolist() == [11, 12]
    assert first.logp.tolist() == [-0.5, -1.25]
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert (first.version, second.version) == ("7", "7+8")
    assert first.prompt_ids.tolist() == PROMPT
    assert first.topk is None


async def test_the_samplers_own_list_has_the_sampled_token_taken_out_when_it_is_one_more():
    lists = [
        {"token_id:11": -0.5, "token_id:3": -1.5},
        {"token_id:12": -9.0, "token_id:4": -0.25, "token_id:5": -2.0},
    ]
    c, script = client((200, sampled(choice(logp=(-0.5, -9.0), lists=lists))))
    [rollout] = await c.sample(PROMPT, 1, SamplingParams(max_tokens=4, seed=1), k=2)
    assert script.body()["logprobs"] == 2
    assert rollout.topk.start == len(PROMPT) - 1
    assert rollout.topk.ids.tolist() == [[11, 3], [4, 5]]
    assert rollout.topk.actual_logp.tolist() == [-0.5, -9.0]
    assert rollout.topk.actual_ids.tolist() == [11, 12]


@pytest.mark.parametrize(
    "inexact",
    [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
    ],
)
async def test_a_raw_logprob_is_never_recorded_for_another_distribution(inexact: dict):
    """vLLM's default logprobs are those before temperature and truncation: unknown for what was really sampled from."""
    params = SamplingParams(max_tokens=4, seed=1, **inexact)
    c, _ = client((200, sampled(choice())))
    [rollout] = await c.sample(PROMPT, 1, params)
    assert np.isnan(rollout.logp).all()
    assert not rollout.sampling.exact
    assert c.metrics["inexact_rollouts"] == 1


async def test_processed_logprobs_are_those_of_the_tempered_distribution_but_greedy_has_none():
    for temperature, known in ((0.7, True), (0.0, False)):
        c, _ = client((200, sampled(choice())), logprobs_mode="processed_logprobs")
        [rollout] = await c.sample(PROMPT, 1, SamplingParams(max_tokens=4, temperature=temperature, seed=1))
        assert np.isfinite(rollout.logp).all() == known


async def test_a_retry_draws_the_same_completions_again():
    c, script = client((503, {"error": {"message": "busy"}}), (200, sampled(choice())))
    [rollout] = await c.sample(PROMPT, 1, SamplingParams(max_tokens=4))
    assert script.body(0)["seed"] == script.body(1)["seed"] == rollout.sampling.seed
    c2, script2 = client((200, sampled(choice())))
    await c2.sample(PROMPT, 1, SamplingParams(max_tokens=4))
    assert script2.body()["seed"] != rollout.sampling.seed, "another call draws anew"


async def test_a_reply_to_sampling_that_fails_its_checks_is_not_rolled_again():
    c, script = client((200, sampled(choice(logp=(-0.5, float("nan"))))))
    with pytest.raises(ResponseError):
        await c.sample(PROMPT, 1, SamplingParams(max_tokens=4))
    assert len(script.requests) == 1


async def test_nan_on_the_server_gets_one_retry_with_another_cache_salt():
    nan = (500, {"error": {"message": "Out of range float values are not JSON compliant"}})
    c, script = client(nan, nan)
    with pytest.raises(TopkdError, match="NaN"):
        await c.score([1, 2, 3], 0, 2)
    assert "cache_salt" not in script.body(0)
    assert script.body(1)["cache_salt"] == "retry-1"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"finish": "abort"}, ServerPausedError, "aborted"),
        ({"finish": "tool_calls"}, ResponseError, "finish_reason"),
        ({"finish": None}, ResponseError, "finish_reason"),
        ({"token_ids": None}, ResponseError, "no token_ids"),
        ({"logprobs": None}, ResponseError, "no logprobs"),
        ({"token_ids": [11]}, AlignmentError, "do not match"),
        ({"token_ids": [11, 13]}, AlignmentError, "another token"),
        ({"token_ids": []}, ResponseError, "number of tokens"),
        ({"token_ids": [11, 12, 13, 14, 15]}, ResponseError, "number of tokens"),
        ({"token_ids": [11, 5000]}, ResponseError, "outside the vocabulary"),
        ({"token_ids": [11, -1]}, ResponseError, "token id"),
        ({"token_ids": [11, 10**30]}, ResponseError, "token id|out of range|shape"),
        ({"logp": (-0.5, None)}, ResponseError, "of a sampled token is invalid"),
        ({"logp": (-0.5, -9999.0)}, ResponseError, "of a sampled token is invalid"),
        ({"logp": (-0.5, 0.5)}, ResponseError, "of a sampled token is invalid"),
        ({"index": 1}, ResponseError, "wrong choices"),
    ],
)
async def test_a_sampling_reply_that_cannot_be_trusted_is_refused(change: dict, kind, words: str):
    built = choice(**{k: v for k, v in change.items() if k in {"finish", "logp", "index"}})
    built |= {k: v for k, v in change.items() if k in {"token_ids", "logprobs"}}
    c, _ = client(*[(200, sampled(built))] * 6, vocab_size=1000)
    with pytest.raises(kind, match=words) as caught:
        await c.sample(PROMPT, 1, SamplingParams(max_tokens=4, seed=1))
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (None, "do not match"),
        ([{"token_id:11": -0.5, "token_id:3": -1.5}], "do not match"),
        ([{" the": -0.5, " a": -1.5}] * 2, "named by token id"),
        ([{"token_id:11": -0.5, "token_id:3": -1.5}, {"token_id:7": -0.5, "token_id:3": -1.5}], "realised token"),
        ([{"token_id:11": -0.5, "token_id:3": None}, {"token_id:12": -1.25, "token_id:3": -1.5}], "NaN"),
        ([{"token_id:11": -0.9, "token_id:3": -1.5}, {"token_id:12": -1.25, "token_id:3": -1.5}], "disagree"),
    ],
)
async def test_the_samplers_list_is_checked_like_a_teachers(lists, words: str):
    c, _ = client((200, sampled(choice(lists=lists))))
    with pytest.raises(ResponseError, match=words):
        await c.sample(PROMPT, 1, SamplingParams(max_tokens=4, seed=1), k=2)


CARDS = {"object": "list", "data": [{"id": "teacher", "max_model_len": 4096}]}


async def test_the_only_model_is_found_and_server_info_says_what_is_there():
    c, script = client((200, CARDS), (200, CARDS), (200, {"version": "0.32.0"}), model=None)
    info = await c.server_info()
    assert (info.model, info.max_model_len, info.version, info.models) == ("teacher", 4096, "0.32.0", ("teacher",))
    assert [r.url.removeprefix("http://h:8000") for r in script.requests] == ["/v1/models", "/v1/models", "/version"]


async def test_several_models_are_listed_and_none_is_guessed():
    two = {"data": [{"id": "a"}, {"id": "b"}]}
    c, _ = client((200, two), model=None)
    with pytest.raises(ConfigError, match=r"a, b.*model="):
        await c.score([1, 2], 0, 1)


async def test_a_model_that_is_not_there_is_named_beside_those_that_are():
    c, _ = client((200, CARDS), model="nope")
    with pytest.raises(ModelNotFoundError, match=r"'nope'.*teacher"):
        await c.server_info()


async def test_a_server_without_a_version_route_has_version_empty():
    c, _ = client((200, CARDS), (404, {"detail": "Not Found"}), model="teacher")
    assert (await c.server_info()).version == ""


async def test_the_k_limit_is_an_error_with_the_number_and_is_not_retried():
    said = (
        "Requested prompt logprobs of 64, which is greater than max allowed: 20 (parameter=prompt_logprobs, value=64)"
    )
    c, script = client((400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}))
    with pytest.raises(KLimitError, match=r"K = 64.*K <= 20.*--max-logprobs 64") as caught:
        await c.score([1, 2, 3], 0, 64)
    assert caught.value.limit == 20
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("ids", "start", "k"),
    [
        ([1], 0, 1),
        ([], 0, 1),
        ([1, 2], 1, 1),
        ([1, 2], -1, 1),
        ([1, 2], 0, -1),
        ([1, -2], 0, 1),
        ([1, 100], 0, 1),
        ([1.5, 2.0], 0, 1),
        ([[1, 2]], 0, 1),
    ],
)
async def test_what_cannot_be_scored_is_refused_before_it_is_sent(ids, start: int, k: int):
    c, script = client(vocab_size=100)
    with pytest.raises(ConfigError):
        await c.score(ids, start, k)
    assert not script.requests


@pytest.mark.parametrize(("prompt", "n", "k"), [([], 1, 0), ([1], 0, 0), ([1], 1, -1), ([1000], 1, 0), ([0.5], 1, 0)])
async def test_what_cannot_be_sampled_is_refused_before_it_is_sent(prompt, n: int, k: int):
    c, script = client(vocab_size=100)
    with pytest.raises(ConfigError):
        await c.sample(prompt, n, SamplingParams(), k=k)
    assert not script.requests


async def test_k_zero_gives_the_realised_tokens_alone():
    ids = np.array([4, 5, 6])
    rows = [None, {5: (-1.0, 40)}, {6: (-0.25, 1)}]
    c, _ = client((200, score_body(ids, rows)))
    topk = await c.score(ids, 0, 0)
    assert (topk.k, topk.actual_logp.tolist()) == (0, [-1.0, -0.25])


async def test_connect_refuses_a_dialect_it_does_not_know():
    with pytest.raises(ConfigError, match=r"'smoke'.*vllm"):
        await connect("http://127.0.0.1:1", dialect="smoke")


def test_config_is_frozen_and_refuses_unknown_keys():
    with pytest.raises(ValueError, match="max_retrys"):
        ClientConfig(max_retrys=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="frozen"):
        ClientConfig().max_retries = 3  # type: ignore[misc]
