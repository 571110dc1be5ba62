"""Replies of vLLM 0.33, recorded from its own Python on the CPU kernels of 0.32, sent back over loopback.

What is new since 0.32: a paused server rejects what it gets, replies name the weights of every span of tokens (or null
where that was not asked for), and a generated list is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.probing import served
from tests.faults.server import PAUSED
from topkd.clients import ClientConfig, VllmCompletions, VllmGenerate
from topkd.topk.errors import RequestRefusedError, ServerPausedError
from topkd.topk.samples import Rollout, SamplingParams

FOLDER = Path(__file__).parents[2] / "golden" / "vllm-0.33.0"
CAPTURES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
}
ONCE = ClientConfig(max_retries=0, response_retries=0, pause_timeout_s=0.0)
MODELS = {"data": [{"id": "t", "max_model_len": 1024}]}
SCORES = ["y1_score_completions", "y1b_score_generate"]
DRAWS = {
    "y3_draw_generate": "default",
    "y4_draw_completions_versions_unasked": "",
    "y4b_draw_completions_versions": "default",
    "y7_draw_spans_generate": "default+step-1",
    "y7b_draw_spans_completions": "step-1+default",
}
PAUSES = ["y2_paused_completions", "y2b_paused_generate"]
REFUSED = {"y5_empty_prompt": "must pass at least one prompt", "y5b_empty_prompt_generate": "at least 1 item"}
CONTROL = ["y0_version", "y2a_pause_wait", "y2c_is_paused", "y2e_resume"]


def _body(name: str) -> Any:
    return CAPTURES[name]["response"]["body"]


def _replaying(name: str) -> Any:
    response = CAPTURES[name]["response"]

    def handler(method: str, path: str, _: Any) -> tuple[int, Any]:
        if method == "POST":
            return response["status"], response["body"]
        return (200, _body("y0_version")) if path == "/version" else (200, MODELS) if "models" in path else (404, {})

    return served(handler)


def _client(name: str, url: str) -> VllmCompletions:
    generate = "generate" in CAPTURES[name]["request"]["path"]
    return (VllmGenerate if generate else VllmCompletions)(url, model="t", config=ONCE)


def _asked(name: str) -> tuple[list[int], dict[str, Any]]:
    request = CAPTURES[name]["request"]["json"]
    return request.get("token_ids", request.get("prompt")), request.get("sampling_params", request)


async def _draw(name: str) -> list[Rollout]:
    ids, sampling = _asked(name)
    params = SamplingParams(sampling["max_tokens"], seed=sampling["seed"])
    with _replaying(name) as url:
        async with _client(name, url) as client:
            return await client.sample(ids, sampling["n"], params, k=sampling["logprobs"])


@pytest.mark.parametrize("name", SCORES)
async def test_a_score_is_its_ranks_and_its_realised_tokens(name: str):
    ids, sampling = _asked(name)
    k, reply = sampling["prompt_logprobs"], _body(name)
    rows = reply.get("prompt_logprobs") or reply["choices"][0]["prompt_logprobs"]
    with _replaying(name) as url:
        async with _client(name, url) as client:
            topk = await client.score(ids, 2, k)
    assert topk.rows == len(ids) - 3
    for row, entries in enumerate(rows[3:]):
        best = sorted((e["rank"], int(token), e["logprob"]) for token, e in entries.items())[:k]
        assert topk.ids[row].tolist() == [token for _, token, _ in best]
        np.testing.assert_allclose(topk.logp[row], [logp for _, _, logp in best], rtol=1e-6)
        assert topk.actual_logp[row] == np.float32(entries[str(ids[row + 3])]["logprob"])


@pytest.mark.parametrize("name", DRAWS)
async def test_a_draw_is_its_ids_and_names_the_weights_of_all_its_spans(name: str):
    for rollout, choice in zip(await _draw(name), _body(name)["choices"], strict=True):
        assert rollout.completion_ids.tolist() == choice["token_ids"]
        content = choice["logprobs"].get("content")
        logp = choice["logprobs"].get("token_logprobs") or [entry["logprob"] for entry in content]
        np.testing.assert_allclose(rollout.logp, logp, rtol=1e-6)
        assert rollout.version == DRAWS[name]
        spans = choice["weight_versions"]
        assert "+".join(span["version"] for span in spans or []) == DRAWS[name]
        if spans is not None:
            assert [spans[0]["start"], spans[-1]["end"]] == [0, len(choice["token_ids"])]


async def test_a_generated_list_is_whole_with_the_sampled_token_outside_it_as_well():
    ids, outside = _asked("y3_draw_generate")[0], 0
    for rollout, choice in zip(await _draw("y3_draw_generate"), _body("y3_draw_generate")["choices"], strict=True):
        assert rollout.topk is not None
        assert rollout.topk.start == len(ids) - 1
        for row, entry in enumerate(choice["logprobs"]["content"]):
            best = sorted(entry["top_logprobs"], key=lambda one: one["rank"])[:3]
            assert rollout.topk.ids[row].tolist() == [one["token_id"] for one in best]
            outside += entry["token_id"] not in rollout.topk.ids[row]
    assert outside, "the draw must show the case"


@pytest.mark.parametrize("name", PAUSES)
async def test_a_paused_server_is_known_by_its_words(name: str):
    assert _body(name) == PAUSED, "what the loopback server of the fault tests answers"
    assert CAPTURES[name]["response"]["retry_after"] is None
    with _replaying(name) as url:
        async with _client(name, url) as client:
            with pytest.raises(ServerPausedError, match="Generation is paused"):
                await client.score(_asked(name)[0], 0, 4)


async def test_a_draw_that_a_pause_aborted_is_no_completion():
    assert _body("y6_draw_aborted")["choices"][0]["finish_reason"] == "abort"
    with pytest.raises(ServerPausedError, match="aborted"):
        await _draw("y6_draw_aborted")


@pytest.mark.parametrize("name", REFUSED)
async def test_an_empty_prompt_is_refused_in_other_words_than_before(name: str):
    with _replaying(name) as url:
        async with _client(name, url) as client:
            with pytest.raises(RequestRefusedError, match=REFUSED[name]):
                await client.score([444, 560], 0, 2)


async def test_the_version_is_the_plain_number():
    with _replaying("y0_version") as url:
        async with VllmGenerate(url, model="t", config=ONCE) as client:
            assert (await client.server_info()).version == "0.33.0"
            assert await client.version() == (0, 33)


def test_every_capture_has_a_claim():
    assert CAPTURES.keys() == {*SCORES, *DRAWS, *PAUSES, *REFUSED, *CONTROL, "y6_draw_aborted"}
