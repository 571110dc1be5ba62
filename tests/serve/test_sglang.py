"""SGLang's dialect: entries against float64, both transports alike, weights from disk."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.applications import Starlette

from tests.contract.adapters import make_adapter
from tests.serve.apps import client, exact_logp, make_app, post, random_ids

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sglang(models: Path) -> Iterator[Starlette]:
    app = make_app(models / "policy", dialect="sglang", max_logprobs=2)
    yield app
    app.state.served.engine.stop()


async def _score(app: Starlette, ids: list[int], start: int, k: int, **fields: object) -> dict:
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": k,
        **fields,
    }
    return (await post(app, "/generate", body))["meta_info"]


@pytest.mark.parametrize("start", [0, 7, 16])
async def test_lists_start_at_the_start_with_a_null_and_hold_exactly_k(sglang: Starlette, models: Path, start: int):
    ids, k = random_ids(17, seed=3), 64
    exact = exact_logp(models / "policy", ids)
    meta = await _score(sglang, ids, start, k)
    assert meta["input_token_logprobs"][0] == [None, ids[start], None]
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_token_logprobs"]) == len(meta["input_top_logprobs"]) == 17 - start
    for position in range(start + 1, 17):
        row = exact[position - 1]
        logp, token, text = meta["input_token_logprobs"][position - start]
        assert (token, text) == (ids[position], None)
        assert abs(logp - row[token]) < TOLERANCE
        listed = meta["input_top_logprobs"][position - start]
        assert [entry[1] for entry in listed] == np.argsort(-row)[:k].tolist()
        assert all(abs(entry[0] - row[entry[1]]) < TOLERANCE for entry in listed)


async def test_flat_arrays_carry_the_nested_lists_exactly(sglang: Starlette):
    ids = random_ids(12, seed=4)
    nested = await _score(sglang, ids, 4, 9)
    flat = await _score(sglang, ids, 4, 9, return_flat_raw_top_logprobs=True, return_flat_raw_top_logprobs_b64=True)
    assert "input_top_logprobs" not in flat
    assert flat["input_top_logprobs_shape"] == [7, 9]
    assert flat["input_top_logprobs_null_prefix"] == 1
    values, indices = (
        np.frombuffer(base64.b64decode(flat[f"input_top_logprobs_{name}_flat_b64"]), kind).reshape(7, 9)
        for name, kind in (("val", "<f4"), ("idx", "<i4"))
    )
    assert indices.tolist() == [[entry[1] for entry in row] for row in nested["input_top_logprobs"][1:]]
    np.testing.assert_allclose(
        values, [[entry[0] for entry in row] for row in nested["input_top_logprobs"][1:]], rtol=1e-6
    )


async def test_chosen_ids_are_scored_at_every_row(sglang: Starlette, models: Path):
    ids, wanted = random_ids(10, seed=5), [9, 700, 5]
    meta = await _score(sglang, ids, 2, 0, token_ids_logprob=wanted, return_text_in_logprobs=True)
    rows = meta["input_token_ids_logprobs"]
    assert rows[0] is None
    assert len(rows) == 8
    exact = exact_logp(models / "policy", ids)
    for position, row in enumerate(rows[1:], start=3):
        assert [entry[1] for entry in row] == wanted
        assert [entry[0] for entry in row] == pytest.approx(exact[position - 1, wanted], abs=TOLERANCE)
    words = sglang.state.served.words
    assert [entry[2] for entry in rows[1]] == [words.text(token) for token in wanted]


async def test_drawn_logprobs_follow_the_temperature_unless_greedy(sglang: Starlette, models: Path):
    prompt = random_ids(8, seed=6)
    for temperature in (0.5, 0):
        sampling = {"max_new_tokens": 6, "temperature": temperature, "sampling_seed": 3, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2}
        reply = await post(sglang, "/generate", body)
        meta, drawn = reply["meta_info"], reply["output_ids"]
        assert meta["finish_reason"] == {"type": "length", "length": 6}
        assert meta["input_token_logprobs"] == []
        exact = exact_logp(models / "policy", prompt + drawn)[len(prompt) - 1 : -1]
        scaled = exact / (temperature or 1)
        scaled = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        for row, token, entry, listed in zip(
            scaled, drawn, meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True
        ):
            assert entry[1] == token
            assert abs(entry[0] - row[token]) < TOLERANCE
            assert [top[1] for top in listed] == np.argsort(-row)[:2].tolist()


async def test_a_batch_and_n_give_a_list_and_one_prompt_an_object(sglang: Starlette):
    sampling = {"max_new_tokens": 2, "ignore_eos": True}
    prompts = [random_ids(4), random_ids(6)]
    async with client(sglang) as http:
        several = (await http.post("/generate", json={"input_ids": prompts, "sampling_params": sampling})).json()
        drawn = (await http.post("/generate", json={"text": "def", "sampling_params": {**sampling, "n": 3}})).json()
        single = (await http.post("/generate", json={"input_ids": [9], "sampling_params": sampling})).json()
    assert [reply["meta_info"]["prompt_tokens"] for reply in several] == [4, 6]
    assert len(drawn) == 3
    assert single["meta_info"]["completion_tokens"] == len(single["output_ids"]) == 2


async def test_weights_come_from_disk_with_their_version(sglang: Starlette, models: Path):
    ids = random_ids(9, seed=7)
    async with client(sglang) as http:
        assert (await http.post("/pause_generation", json={"mode": "retract"})).status_code == 200
        body = {"model_path": str(models / "updated"), "weight_version": "step-3", "flush_cache": True}
        assert (await http.post("/update_weights_from_disk", json=body)).json()["success"] is True
        await http.post("/continue_generation", json={})
        assert (await http.get("/model_info")).json()["weight_version"] == "step-3"
        meta = await _score(sglang, ids, 0, 0)
        assert meta["weight_version"] == "step-3"
        row = exact_logp(models / "updated", ids)
        assert meta["input_token_logprobs"][-1][0] == pytest.approx(row[-2, ids[-1]], abs=TOLERANCE)
        wrong = await http.post("/update_weights_from_disk", json={"model_path": str(models / "wide")})
        assert wrong.status_code == 400
        assert wrong.json()["success"] is False
        back = {"model_path": str(models / "policy"), "weight_version": "default"}
        assert (await http.post("/update_weights_from_disk", json=back)).status_code == 200


async def test_an_adapter_is_chosen_by_its_name(sglang: Starlette, models: Path, tmp_path: Path):
    adapter = make_adapter(models / "policy", tmp_path / "a", seed=8)
    ids = random_ids(9, seed=8)
    async with client(sglang) as http:
        loaded = (await http.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": str(adapter)})).json()
        assert loaded["success"] is True
        assert loaded["loaded_adapters"] == {"a": str(adapter)}
        base, tuned = [await _score(sglang, ids, 0, 0, lora_path=name) for name in (None, "a")]
        assert base["input_token_logprobs"] != tuned["input_token_logprobs"]
        assert (await http.post("/unload_lora_adapter", json={"lora_name": "a"})).json()["success"] is True
        assert (await http.post("/unload_lora_adapter", json={"lora_name": "a"})).status_code == 400
    assert (await _score(sglang, ids, 0, 0))["input_token_logprobs"] == base["input_token_logprobs"]


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("custom_logit_processor", "code", [None]),
        ("image_data", ["http://x/a.png"], [None]),
        ("video_data", "http://x/a.mp4", []),
        ("audio_data", "http://x/a.wav", None),
        ("input_embeds", [[0.0, 1.0]], []),
        ("session_params", {"id": "s"}, {}),
    ],
)
async def test_a_field_that_is_not_done_is_refused_by_name(
    sglang: Starlette, field: str, value: object, neutral: object
):
    ids = [9, 10]
    async with client(sglang) as http:
        reply = await http.post("/generate", json={"input_ids": ids, field: value})
    assert reply.status_code == 400
    assert f"`{field}` is not supported by topkd serve" in reply.json()["error"]["message"]
    assert (await _score(sglang, ids, 0, 2, **{field: neutral}))["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "Either text, input_ids or input_embeds"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [9], "stream": True}, "does not stream"),
        ({"input_ids": [5] * 5000}, "longer than the model's context length"),
        ({"input_ids": [9, 5000]}, "Token id 5000"),
        ({"input_ids": [9], "return_logprob": True, "logprob_start_len": 4}, "logprob_start_len"),
        ({"input_ids": [9], "return_logprob": True, "token_ids_logprob": [9999]}, "valid range is [0, 2048)"),
    ],
)
async def test_a_wrong_request_is_refused_in_the_flat_envelope(sglang: Starlette, fields: dict, words: str):
    async with client(sglang) as http:
        reply = await http.post("/generate", json=fields)
    assert reply.status_code == 400
    assert list(reply.json()) == ["error"]
    assert words in reply.json()["error"]["message"]


async def test_the_two_dialects_are_told_apart_by_their_routes(sglang: Starlette, app: Starlette):
    async with client(sglang) as http:
        assert (await http.get("/version")).status_code == 404
        assert (await http.get("/server_info")).json()["version"].startswith("0.5.23")
    async with client(app) as http:
        assert (await http.get("/server_info")).status_code == 404
        assert (await http.get("/version")).json()["version"].startswith("0.32.0+topkd")
