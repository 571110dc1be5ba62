"""``/inference/v1/generate``: recorded replies of vLLM 0.32, its neighbours' shapes, and both candidate schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.toy import VOCAB, Toy, Wire, npy, refused, scripted
from topkd.clients.config import ClientConfig
from topkd.clients.dialects.vllm_generate import (
    ROUTE,
    VllmGenerate,
    read_generate_candidates,
    read_generate_scores,
    split_windows,
)
from topkd.topk.errors import (
    AlignmentError,
    ConfigError,
    KLimitError,
    ResponseError,
    ServerPausedError,
    UnsupportedError,
)
from topkd.topk.samples import SamplingParams

GOLDEN = Path(__file__).parents[2] / "golden" / "vllm-0.32.0"
FAST = ClientConfig(backoff_s=0.0, max_retries=1)
TOY = Toy()
PROMPT = [5, 6, 7, 8]


def capture(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())
    return recorded["request"]["json"], recorded["response"]["body"]


def client(wire: Wire, **options: Any) -> VllmGenerate:
    return VllmGenerate("http://h:1", model="t", config=FAST, transport=wire, **options)


def test_a_recorded_score_without_strings_is_read_like_the_one_of_completions():
    request, body = capture("d8_generate_detok_false")
    _, twin = capture("a1_completions_prompt_logprobs_mt1")
    ids = np.array(request["token_ids"], dtype=np.int32)
    k = request["sampling_params"]["prompt_logprobs"]
    rows, zeros, _ = read_generate_scores(json.dumps(body).encode(), ids=ids, start=11, k=k, vocab_size=2048)
    assert (rows.start, rows.rows, rows.k, zeros) == (11, ids.size - 12, k, 0)
    for at, row in enumerate(twin["choices"][0]["prompt_logprobs"][12:]):
        truth = {int(token): entry["logprob"] for token, entry in row.items()}
        assert rows.actual_logp[at] == pytest.approx(truth[int(ids[12 + at])], abs=1e-4)
        for token, logp in zip(rows.ids[at].tolist(), rows.logp[at].tolist(), strict=True):
            assert logp == pytest.approx(truth[token], abs=1e-4)


def test_a_score_of_another_prompt_is_refused():
    request, body = capture("d8_generate_detok_false")
    ids = np.array(request["token_ids"], dtype=np.int32)
    ids[-1] += 1
    with pytest.raises(AlignmentError):
        read_generate_scores(json.dumps(body).encode(), ids=ids, start=0, k=5)


@pytest.mark.parametrize("name", ["v1_all_rows", "v2_start", "v4_ragged", "v3_negative_pad"])
def test_recorded_candidate_matrices_are_read_in_the_order_asked(name: str):
    request, body = capture(name)
    asked = request["sampling_params"]["prompt_logprob_token_ids"]
    columns = max(len(row) for row in asked)
    got = read_generate_candidates(json.dumps(body).encode(), rows=len(asked), columns=columns)
    for row, ids in enumerate(asked):
        padded = ids + [-1] * (columns - len(ids))
        assert np.isneginf(got[row]).tolist() == [token < 0 for token in padded]
    if name == "v2_start":  # the same rows as the tail of v1
        _, whole = capture("v1_all_rows")
        np.testing.assert_array_equal(
            got, read_generate_candidates(json.dumps(whole).encode(), rows=16, columns=4)[12:]
        )


def test_a_matrix_of_another_shape_or_none_at_all_is_refused():
    _, body = capture("v2_start")
    with pytest.raises(AlignmentError, match="shape"):
        read_generate_candidates(json.dumps(body).encode(), rows=5, columns=4)
    with pytest.raises(ResponseError, match="ignored"):
        read_generate_candidates(json.dumps(body | {"prompt_token_id_logprobs": None}).encode(), rows=4, columns=4)


def generated(shape: str, ids: list[int], *, k: int, cut: bool) -> dict[str, Any]:
    """A reply in one of the three shapes; ``cut`` gives the sampled token one of the K places, as before 0.33."""

    def entry(token: int, row: np.ndarray) -> dict[str, Any]:
        rank = int((row > row[token]).sum()) + 1
        if shape == "named":
            return {"token": f"token_id:{token}", "logprob": float(row[token]), "bytes": None}
        return {"token_id": token, "logprob": float(row[token]), "rank": rank}

    content = []
    for before, token in zip([PROMPT[-1], *ids], ids, strict=False):
        row = TOY.logp[before]
        listed = [token, *(t for t, _ in TOY.top(row, k) if t != token)]
        if token in {t for t, _ in TOY.top(row, k)}:
            listed = [token, *(t for t, _ in TOY.top(row, k) if t != token)]
        content.append(entry(token, row) | {"top_logprobs": [entry(t, row) for t in (listed[:k] if cut else listed)]})
    choice = {"index": 0, "token_ids": ids, "finish_reason": "length", "logprobs": {"content": content}}
    if shape != "named":
        choice["weight_versions"] = [{"version": "7", "start": 0, "end": len(ids)}]
    return {"choices": [choice]}


@pytest.mark.parametrize(
    ("version", "shape", "cut"), [("0.31.2", "named", True), ("0.32.0", "ranked", True), ("0.33.0", "ranked", False)]
)
async def test_all_three_reply_shapes_give_the_whole_list_and_exact_logprobs(version: str, shape: str, cut: bool):
    ids = TOY.draw(PROMPT, 12, seed=4)
    asked = 4 if cut else 3
    wire = scripted({"version": version}, generated(shape, ids, k=asked, cut=cut))
    [rollout] = await client(wire).sample(PROMPT, 1, SamplingParams(12, seed=1), k=3)
    sent = wire.bodies(ROUTE)[0]["sampling_params"]
    assert (sent["logprobs"], sent["detokenize"], sent["top_p"], sent["seed"]) == (asked, False, 1.0, 1)
    rows = TOY.rows([*PROMPT, *ids])[len(PROMPT) - 1 :]
    assert rollout.completion_ids.tolist() == ids
    np.testing.assert_allclose(rollout.logp, rows[np.arange(12), ids], atol=1e-6)
    assert rollout.topk is not None
    np.testing.assert_array_equal(rollout.topk.ids, [[t for t, _ in TOY.top(row, 3)] for row in rows])
    assert any(ids[i] not in rollout.topk.ids[i] for i in range(12)), "the draw must show the case"
    assert rollout.version == ("" if shape == "named" else "7")


async def test_a_list_with_a_gap_is_refused_by_its_ranks():
    reply = generated("ranked", TOY.draw(PROMPT, 6, seed=4), k=4, cut=False)
    del reply["choices"][0]["logprobs"]["content"][3]["top_logprobs"][1:3]
    with pytest.raises(ResponseError):
        await client(scripted({"version": "0.33.0"}, reply)).sample(PROMPT, 1, SamplingParams(6), k=4)


async def test_an_aborted_generation_is_drawn_again():
    ids = TOY.draw(PROMPT, 3)
    aborted = generated("ranked", ids, k=0, cut=False)
    aborted["choices"][0]["finish_reason"] = "abort"
    wire = scripted(aborted)
    config = ClientConfig(max_retries=0, pause_timeout_s=0)
    with pytest.raises(ServerPausedError):
        await VllmGenerate("http://h:1", model="t", config=config, transport=wire).sample(PROMPT, 1, SamplingParams(3))


def candidate_server(schema: str, limit: int, version: str) -> Wire:
    """A vLLM that takes one schema and refuses the other the way pydantic does."""

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"version": version}
        sampling = body["sampling_params"]
        if "prompt_logprobs" in sampling:
            message = f"Requested prompt logprobs of {sampling['prompt_logprobs']}, which is greater than max allowed: "
            return refused(message + str(limit))
        asked, start, ids = sampling["prompt_logprob_token_ids"], sampling["prompt_logprob_start"], body["token_ids"]
        rows = TOY.rows(ids)[start:]
        if isinstance(asked[0], list) != (schema == "rows"):
            return refused(
                "{'type': 'list_type', 'loc': 'body.sampling_params.prompt_logprob_token_ids.0', "
                "'msg': 'Input should be a valid list'}"
            )
        if schema == "rows":
            values = np.array(
                [[-np.inf if t < 0 else row[t] for t in ids] for row, ids in zip(rows, asked, strict=True)]
            )
        else:
            if len(asked) > limit or len(set(asked)) != len(asked) or min(asked) < 0:
                return refused(f"Requested {len(asked)} token ids, which is greater than max allowed: {limit}")
            values = rows[:, asked]
        return 200, {"prompt_token_id_logprobs": npy(values), "choices": []}

    return Wire(handler)


def wanted(rows: int, k: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(VOCAB, k, replace=False) for _ in range(rows)]).astype(np.int32)


@pytest.mark.parametrize(
    ("schema", "version"),
    [("rows", "0.32.0"), ("shared", "0.31.1"), ("shared", "0.32.0"), ("rows", "0.31.1"), ("rows", "dev")],
)
async def test_candidates_come_out_the_same_in_either_schema_whatever_the_version_said(schema: str, version: str):
    ids = np.random.default_rng(3).integers(0, VOCAB, 12)
    asked = wanted(8, 4)
    asked[2, 1] = asked[5, 3] = -1
    up = client(candidate_server(schema, 12, version))
    got = await up.score_candidates(ids, 3, asked)
    rows = TOY.rows(ids)[3:]
    truth = np.where(asked < 0, -np.inf, np.take_along_axis(rows, np.maximum(asked, 0), axis=1))
    np.testing.assert_allclose(got, truth, atol=1e-5)
    np.testing.assert_allclose(await up.score_candidates(ids, 3, asked), truth, atol=1e-5)


async def test_rows_that_share_too_few_candidates_are_refused_not_scored_in_a_hundred_requests():
    ids = np.random.default_rng(3).integers(0, VOCAB, 42)
    with pytest.raises(UnsupportedError, match="share too few"):
        await client(candidate_server("shared", 4, "0.31.0")).score_candidates(ids, 0, wanted(41, 4))


def test_windows_hold_at_most_the_limit_and_cover_every_row():
    asked = wanted(30, 3)
    ranges = split_windows(asked, 20)
    assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, 30)
    for first, last in ranges:
        assert np.unique(asked[first:last]).size <= 20


async def test_a_candidate_reply_with_more_than_all_probability_is_refused():
    reply = {"prompt_token_id_logprobs": npy(np.full((3, 3), -0.5)), "choices": []}
    with pytest.raises(ResponseError, match="add up to more than 1"):
        await client(scripted({"version": "0.32.0"}, reply, reply)).score_candidates(PROMPT, 0, wanted(3, 3))


async def test_a_pad_that_comes_back_with_a_logprob_is_refused():
    asked = np.array([[3, -1]] * 3, dtype=np.int32)
    reply = {"prompt_token_id_logprobs": npy(np.full((3, 2), -3.0)), "choices": []}
    with pytest.raises(ResponseError, match="pad"):
        await client(scripted({"version": "0.32.0"}, reply, reply)).score_candidates(PROMPT, 0, asked)


async def test_refusals_of_this_route_say_what_to_start_the_server_with():
    asked = wanted(3, 2)
    cases = [
        (refused("Not Found", 404), UnsupportedError, "--enable-scale-out"),
        (
            refused("prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."),
            UnsupportedError,
            "V2_MODEL",
        ),
        (
            refused("Requested 2 token ids per row in prompt_logprob_token_ids, which is greater than max allowed: 1"),
            KLimitError,
            "K <= 1",
        ),
    ]
    for reply, error, words in cases:
        with pytest.raises(error, match=words):
            await client(scripted({"version": "0.32.0"}, reply)).score_candidates(PROMPT, 0, asked)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2), int), np.zeros((3, 0), int), np.zeros(3, int), np.zeros((3, 2)), np.full((3, 2), -2)]
)
async def test_candidates_that_cannot_be_right_are_refused_before_any_request(bad: np.ndarray):
    with pytest.raises(ConfigError):
        await client(scripted()).score_candidates(PROMPT, 0, bad)


@pytest.mark.vllm
@pytest.mark.slow
async def test_draws_of_a_real_vllm_0_31_are_read_in_its_own_shape(tmp_path: Path):
    from tests.contract.reference import logp_rows
    from tests.contract.servers import OLDER_VLLM_PYTHON, vllm_server
    from tests.fakes.tinymodels import make_tiny_model

    if not OLDER_VLLM_PYTHON.exists():
        pytest.skip("vLLM 0.31 is not installed in .venv-vllm-0.31 (optional)")
    folder = tmp_path / "model"
    make_tiny_model(folder, seed=1, std=0.25)
    options = {"model": "t", "log": tmp_path / "log", "max_logprobs": 20, "max_model_len": 256}
    ids = np.random.default_rng(6).integers(8, 2048, 20).tolist()
    with vllm_server(folder, **options, python=OLDER_VLLM_PYTHON) as server:
        async with VllmGenerate(server.url, vocab_size=2048) as up:
            assert await up.version() == (0, 31)
            [rollout] = await up.sample(ids, 1, SamplingParams(12, seed=2), k=6)
            scores = await up.score(ids, 4, 20)
            with pytest.raises(KLimitError):
                await up.sample(ids, 1, SamplingParams(2), k=20)
    rows = logp_rows(folder, [*ids, *rollout.completion_ids.tolist()])[len(ids) - 1 : -1]
    np.testing.assert_allclose(rollout.logp, rows[np.arange(12), rollout.completion_ids], atol=1e-4)
    assert rollout.topk is not None
    np.testing.assert_allclose(rollout.topk.logp, -np.sort(-rows, axis=1)[:, :6], atol=1e-4)
    np.testing.assert_allclose(scores.logp, -np.sort(-logp_rows(folder, ids)[4:-1], axis=1)[:, :20], atol=1e-4)
