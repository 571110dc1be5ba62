"""Every recorded reply of a real vLLM and a real llama.cpp, sent back over loopback, is the truth or a typed error.

What a reply holds is read here by hand, from its ranks and ids; a capture that no claim names fails the last test.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.probing import served
from topkd.clients import ClientConfig, FireworksEcho, OpenAIChat, Sglang, VllmCompletions, VllmGenerate
from topkd.topk.errors import (
    AlignmentError,
    AuthError,
    ContextLimitError,
    KLimitError,
    ModelNotFoundError,
    RequestRefusedError,
    ResponseError,
    ServerFailedError,
    TopkdError,
    UnsupportedError,
)
from topkd.topk.samples import SamplingParams

GOLDEN = Path(__file__).parents[2] / "golden"
ONCE = ClientConfig(max_retries=0, response_retries=0, backoff_s=0.0)
MODELS = {"object": "list", "data": [{"id": "t", "max_model_len": 8192}]}
GENERATE = "/inference/v1/generate"


def _capture(path: Path) -> tuple[str, Any, int, bytes]:
    """Route, request, status and body; of what is no completion the route is ""."""
    recorded = json.loads(path.read_text())
    request, response = recorded["request"], recorded["response"]
    body = response["body"]
    raw = json.dumps(body) if isinstance(body, dict | list) else str(response.get("raw_text") or body or "")
    asked = request["method"] == "POST" and any(word in request["path"] for word in ("completion", "generate"))
    return request["path"] if asked else "", request["json"], response["status"], raw.encode()


CAPTURES = {path.stem: _capture(path) for name in ("vllm-0.32.0", "llama-cpp")
            for path in sorted((GOLDEN / name).glob("*.json"))}  # fmt: skip
CAPTURES = {name: capture for name, capture in CAPTURES.items() if capture[0]}
OURS = {name: capture for name, capture in CAPTURES.items() if not name.startswith(("ll_", "lcp_"))}

# A prompt in ids whose rows were asked for and given.
SCORED = [
    "a1_completions_prompt_logprobs_mt1", "a3_completions_prompt_logprobs_temp0",
    "a3b_completions_prompt_logprobs_temp07_topk", "a4_completions_prompt_logprobs_0",
    "b4_completions_echo_and_prompt_logprobs", "d3_generate_both_flat", "d4_generate_text_mode",
    "d6_generate_no_model_field", "d8_generate_detok_false", "f0_first_request",
    "f3_processed_allowed_tokens_gen", "f4_generate_processed_topk3", "f6_temperature_effect_processed",
    "v10_with_prompt_logprobs",
]  # fmt: skip
SAMPLED = ["d2_generate_logprobs", "d3_generate_both_flat", "v17_gen_logprobs", "x4_generate_stop_eos_minmax"]
TRUNCATED = "f4_generate_processed_topk3"
CANDIDATES = ["v1_all_rows", "v2_start", "v3_negative_pad", "v4_ragged", "v10_with_prompt_logprobs",
              "v14_temperature", "v16_n2"]  # fmt: skip
# What a client makes of a reply to a request that it would not send, or that the server refused.
REFUSED: dict[str, tuple[type[TopkdError], str]] = {
    "a2_completions_prompt_logprobs_mt0": (ContextLimitError, "at least 1, got 0"),
    "a6_completions_batch_prompts": (ResponseError, "wrong number of choices.*got 2"),
    "a7_completions_prompt_text": (AlignmentError, "wrong number of rows.*got 2, expected 5"),
    "a9_completions_prompt_logprobs_minus1_over_max": (KLimitError, "max allowed: 256"),
    "d5_generate_prompt_logprob_token_ids": (UnsupportedError, "scores no candidates"),
    "d9_generate_logprob_token_ids": (ResponseError, "no prompt_logprobs"),
    "d10_completions_logprob_token_ids": (ResponseError, "no prompt_logprobs"),
    "e1_K_above_max_prompt_logprobs": (KLimitError, "max allowed: 256"),
    "e1b_K_above_max_logprobs": (KLimitError, "max allowed: 256"),
    "e2_prompt_too_long": (ContextLimitError, "4097 input tokens"),
    "e2b_prompt_exactly_max": (ContextLimitError, "at least 1, got 0"),
    "e2c_prompt_max_minus1": (ResponseError, "no prompt_logprobs"),
    "e2d_prompt_exactly_max_mt0": (ContextLimitError, "length 4096"),
    "e2e_generate_too_long": (ContextLimitError, "length 4097"),
    "e3b_generate_unknown_model": (ModelNotFoundError, "`nope` does not exist"),
    "e4_bad_token_id": (RequestRefusedError, "2048 is out of vocabulary"),
    "e4b_bad_token_id_big": (RequestRefusedError, "1000000 is out of vocabulary"),
    "e4c_negative_token_id": (RequestRefusedError, "greater than or equal to 0"),
    "e4d_generate_bad_token": (RequestRefusedError, "1000000 is out of vocabulary"),
    "e6_stream_prompt_logprobs": (UnsupportedError, "not available when `stream=True`"),
    "e7_bad_json_type": (RequestRefusedError, "validation error"),
    "e8_unknown_field": (ResponseError, "no prompt_logprobs"),
    "f2_processed_topk3_gen_logprobs": (ResponseError, "no prompt_logprobs"),
    "v5_wrong_row_count": (RequestRefusedError, "has 2 rows, but the prompt has 4"),
    "v7_out_of_vocab": (RequestRefusedError, "out-of-vocab token ids"),
    "v8_start_without_ids": (RequestRefusedError, "requires prompt_logprob_token_ids"),
    "v9_stream": (RequestRefusedError, "not available when stream"),
    "v11_max_tokens0": (ContextLimitError, "at least 1, got 0"),
    "v13_on_completions": (ResponseError, "no prompt_logprobs"),
    "v15_start_last": (RequestRefusedError, "non-empty integer array"),
    "x1_no_api_key": (AuthError, "Unauthorized.*check api_key, and that one was given"),
    "x1b_bad_api_key": (AuthError, "Unauthorized.*check api_key, and that one was given"),
    "x1d_generate_no_key": (AuthError, "Unauthorized.*check api_key, and that one was given"),
    "x2_n2_prompt_logprobs": (ResponseError, "wrong number of choices.*got 2"),
    "x5_batch_of_prompts_one_bad": (RequestRefusedError, "1000000 is out of vocabulary"),
    "x6_prompt_embeds_absent_string_bad": (RequestRefusedError, "Input should be a valid list"),
    "x8_generate_unknown_sampling_param": (ResponseError, "no prompt_logprobs"),
}
# An echo in strings beside the rows: the rows are read, the strings are not.
ECHOED = ["b1_completions_echo_mt0", "b2_completions_echo_mt0_tokens_as_ids", "b2_completions_echo_mt1_tokens_as_ids",
          "b3_completions_echo_mt0_rtids_both", "b3_completions_echo_mt1_rtids_both"]  # fmt: skip
CHATS: dict[str, tuple[type[TopkdError], str] | None] = {
    "c1_chat_top_logprobs": (ResponseError, "name no single id; give tokenizer"),
    "c2_chat_top_logprobs_tokens_as_ids": None,
    "c3_chat_prompt_logprobs": (ResponseError, "has no logprobs"),
    "c4_chat_max_tokens0": (ContextLimitError, "at least 1, got 0"),
    "e1c_chat_K_above_max": (KLimitError, "max allowed: 256"),
    "f5_chat_processed_topk3": (ResponseError, "name no single id; give tokenizer"),
    "x7_chat_K0_top_logprobs_missing_logprobs": (RequestRefusedError, "logprobs"),
}


def _client(name: str, url: str) -> VllmCompletions:
    return (VllmGenerate if OURS[name][0] == GENERATE else VllmCompletions)(url, model="t", config=ONCE)


def _replaying(name: str) -> Any:
    _, _, status, body = CAPTURES[name]

    def handler(method: str, path: str, _: Any) -> tuple[int, Any]:
        if method == "POST":
            return status, body
        return (200, {"version": "0.32.0"}) if path == "/version" else (200, MODELS) if "models" in path else (404, {})

    return served(handler)


def _asked(name: str) -> tuple[list[int], dict[str, Any]]:
    """The ids that were sent (any, where none were), and the sampling parameters."""
    request = OURS[name][1]
    request = request if isinstance(request, dict) else {}
    ids = request.get("token_ids", request.get("prompt"))
    sane = isinstance(ids, list) and ids and all(isinstance(i, int) and 0 <= i < 2**31 for i in ids)
    return (ids if sane else [444, 560, 10, 280, 14]), request.get("sampling_params", request)


@pytest.mark.parametrize("name", [*SCORED, *ECHOED])
async def test_a_recorded_score_is_its_ranks_and_its_realised_tokens(name: str):
    ids, sampling = _asked(name)
    reply = json.loads(OURS[name][3])
    rows = reply["prompt_logprobs"] if OURS[name][0] == GENERATE else reply["choices"][0]["prompt_logprobs"]
    assert not rows[0], "position 0 describes nothing"
    k = sampling["prompt_logprobs"] if "prompt_logprobs" in sampling else sampling["logprobs"]
    with _replaying(name) as url:
        async with _client(name, url) as client:
            for start in (0, len(ids) - 2):
                topk = await client.score(ids, start, k)
                for row, entries in enumerate(rows[start + 1 :]):
                    ranked = sorted((e["rank"], int(t), e["logprob"]) for t, e in entries.items())[:k]
                    assert [rank for rank, _, _ in ranked] == list(range(1, k + 1))
                    assert topk.ids[row].tolist() == [token for _, token, _ in ranked]
                    np.testing.assert_allclose(topk.logp[row], [logp for _, _, logp in ranked], rtol=1e-6)
                    realised = ids[start + 1 + row]
                    assert topk.actual_ids[row] == realised
                    assert topk.actual_logp[row] == np.float32(entries[str(realised)]["logprob"])
                assert topk.rows == len(ids) - 1 - start


@pytest.mark.parametrize("name", SAMPLED)
async def test_a_recorded_draw_is_its_ids_its_logprobs_and_the_list_that_is_whole(name: str):
    ids, sampling = _asked(name)
    [choice] = json.loads(OURS[name][3])["choices"]
    content = choice["logprobs"]["content"]
    k = max(sampling["logprobs"] - 1, 0)  # one more is asked for: the list is cut with the sampled token in it
    params = SamplingParams(sampling["max_tokens"], temperature=sampling.get("temperature", 1.0))
    with _replaying(name) as url:
        async with _client(name, url) as client:
            [rollout] = await client.sample(ids, 1, params, k=k)
    assert rollout.completion_ids.tolist() == choice["token_ids"] == [entry["token_id"] for entry in content]
    np.testing.assert_allclose(rollout.logp, [entry["logprob"] for entry in content], rtol=1e-6)
    assert rollout.finish_reason == choice["finish_reason"]
    assert rollout.version == "default"
    for row, entry in enumerate(content if k else []):
        best = sorted(entry["top_logprobs"], key=lambda one: one["rank"])[:k]
        assert rollout.topk is not None
        assert rollout.topk.ids[row].tolist() == [one["token_id"] for one in best]


async def test_a_recorded_draw_after_truncation_has_no_logprob_of_the_model():
    """The served numbers are of three renormalised tokens: not the policy's, so they are unknown."""
    ids, sampling = _asked(TRUNCATED)
    [choice] = json.loads(OURS[TRUNCATED][3])["choices"]
    params = SamplingParams(sampling["max_tokens"], temperature=sampling.get("temperature", 1.0), top_k=3)
    with _replaying(TRUNCATED) as url:
        async with _client(TRUNCATED, url) as client:
            [rollout] = await client.sample(ids, 1, params)
    assert rollout.completion_ids.tolist() == choice["token_ids"]
    assert np.isnan(rollout.logp).all()


@pytest.mark.parametrize("name", CANDIDATES)
async def test_recorded_candidates_are_the_matrix_in_the_order_of_the_request(name: str):
    ids, sampling = _asked(name)
    start, asked = sampling.get("prompt_logprob_start", 0), sampling["prompt_logprob_token_ids"]
    width = max(map(len, asked))
    wanted = np.array([[*row, *[-1] * (width - len(row))] for row in asked], np.int32)
    held = np.load(io.BytesIO(base64.b64decode(json.loads(OURS[name][3])["prompt_token_id_logprobs"])))
    with _replaying(name) as url:
        async with _client(name, url) as client:
            found = await client.score_candidates(ids, start, wanted)
    np.testing.assert_array_equal(found, held[:, :width])
    assert (np.isneginf(found) == (wanted == -1)).all(), "-1 pads a row, and has no logprob"


@pytest.mark.parametrize("name", REFUSED)
async def test_a_recorded_refusal_or_reply_without_rows_is_its_typed_error(name: str):
    kind, words = REFUSED[name]
    ids, sampling = _asked(name)
    k = sampling.get("prompt_logprobs", 5) if isinstance(sampling, dict) else 5
    with _replaying(name) as url:
        async with _client(name, url) as client:
            with pytest.raises(kind, match=words) as caught:
                await client.score(ids, 0, k if isinstance(k, int) and k >= 0 else 5)
    assert type(caught.value) is kind
    assert url in str(caught.value)


@pytest.mark.parametrize("name", CHATS)
async def test_a_recorded_chat_is_read_by_ids_or_says_what_is_missing(name: str):
    _, request, _, body = OURS[name]
    k = request.get("top_logprobs") or 0
    params = SamplingParams(max(request["max_tokens"], 1))
    prompt = range(json.loads(body).get("usage", {}).get("prompt_tokens", 3))
    with _replaying(name) as url:
        async with OpenAIChat(url, model="t", config=ONCE) as client:
            asking = client.chat(request["messages"], 1, params, prompt_ids=list(prompt), k=min(k, 20))
            if (expected := CHATS[name]) is not None:
                with pytest.raises(expected[0], match=expected[1]):
                    await asking
                return
            [rollout] = await asking
    content = json.loads(body)["choices"][0]["logprobs"]["content"]
    assert rollout.completion_ids.tolist() == [int(one["token"].removeprefix("token_id:")) for one in content]
    np.testing.assert_allclose(rollout.logp, [one["logprob"] for one in content], rtol=1e-6)


@pytest.mark.parametrize("make", [VllmCompletions, VllmGenerate, Sglang, FireworksEcho])
@pytest.mark.parametrize("name", sorted(CAPTURES.keys() - OURS.keys()))
async def test_no_reply_of_llama_cpp_is_taken_for_a_score(name: str, make: Any):
    """It scores nothing: its echo is not there, in strings, or (llama-cpp-python) one token off."""
    with _replaying(name) as url:
        async with make(url, model="t", config=ONCE) as client:
            with pytest.raises((ResponseError, RequestRefusedError, ServerFailedError, UnsupportedError)) as caught:
                await client.score([444, 560, 10, 280, 14], 1, 5)
    assert "\n" not in str(caught.value)


def test_every_recorded_request_for_logprobs_has_a_claim():
    claimed = {*SCORED, *SAMPLED, *CANDIDATES, *REFUSED, *ECHOED, *CHATS, TRUNCATED}
    assert OURS.keys() - claimed == {"a8_completions_single_token_prompt"}, "one token has no row to score"
