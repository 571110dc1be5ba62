"""The embedded SGLang has the real one's shapes, statuses and words: recorded requests of 0.5.23 are replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.serve.apps import client, make_app

FOLDER = Path(__file__).parents[1] / "golden" / "sglang-0.5.23"
CAPTURES: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}

EXCLUDED = {
    "sample_stream": "no streaming here", "sample_stream_score": "no streaming here",
    "flat_output": "flat lists of generated positions", "gen_flat_noB64": "flat lists without base64",
    "gen_flat_text": "texts of flat lists", "return_prompt_token_ids": "a field of no client's",
    "sample_bias": "an id's bias is written as text of a number in this server's schema",
    "span_long_generation": "was aborted by another request",
}  # fmt: skip
GENERATE = {
    name
    for name, capture in CAPTURES.items()
    if capture["request"]["path"] == "/generate"
    and isinstance(capture["request"]["body"], dict)
    and not capture["server_crashed"]
    and not name.startswith("nan_")
} - set(EXCLUDED)
# Refusals whose words are another program's (a validator's), or name what this server does not have.
OWN_WORDS = {"err_bad_type", "sample_seed_out_of_range", "vocab_discovery_logit_bias"}
CONTROL = {
    "lora_load_disabled", "lora_unload_disabled", "span_continue", "span_pause", "sync_12_continue_empty",
    "sync_1_pause_retract", "sync_5_continue_empty", "GET_mounted_abort_request", "GET_mounted_continue_generation",
    "GET_mounted_generate", "GET_mounted_load_lora_adapter", "GET_mounted_unload_lora_adapter",
    "GET_mounted_update_weights_from_disk", "GET_mounted_reset_prefix_cache", "sync_11_pause_nobody",
    "sync_10_pause_badmode",
} - {"GET_mounted_abort_request", "lora_unload_disabled"}  # fmt: skip


@pytest.fixture(scope="module")
def sglang(models: Path) -> Iterator[Starlette]:
    app = make_app(models / "policy", dialect="sglang", max_logprobs=2, max_model_len=512)
    yield app
    app.state.served.engine.stop()


async def _replay(app: Starlette, name: str) -> tuple[int, Any]:
    request = CAPTURES[name]["request"]
    body = request["body"]
    async with client(app) as http:
        reply = await http.request(request["method"], request["path"], **({} if body is None else {"json": body}))
    try:
        return reply.status_code, reply.json()
    except ValueError:
        return reply.status_code, reply.text


def _shape(value: Any) -> Any:
    """What a client can rely on: keys, lengths of lists and types; ids, texts and numbers are of other weights."""
    if isinstance(value, dict):
        return {key: _shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_shape(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return "number" if isinstance(value, int | float) else "text"


def _comparable(reply: Any) -> Any:
    """A reply without what follows from weights, ends drawn by chance, and a cache of prefixes."""
    if isinstance(reply, list):
        return [_comparable(one) for one in reply]
    meta = dict(reply["meta_info"])
    for key in ("finish_reason", "cached_tokens_details", "output_token_logprobs", "output_top_logprobs"):
        meta.pop(key, None)
    for key in ("input_top_logprobs_val_flat_b64", "input_top_logprobs_idx_flat_b64"):
        meta.pop(key, None)
    return _shape({"keys": sorted(reply["meta_info"]), "meta": meta, "reply": sorted(reply)})


@pytest.mark.parametrize("name", sorted(GENERATE))
async def test_a_recorded_request_is_answered_in_the_real_ones_shape(sglang: Starlette, name: str) -> None:
    status, reply = await _replay(sglang, name)
    recorded = CAPTURES[name]["response"]
    assert status == recorded["status"], reply
    if status != 200:
        assert _shape(reply) == _shape(recorded["json"]) or name in OWN_WORDS
        if name not in OWN_WORDS:
            assert reply == recorded["json"]
        return
    assert _comparable(reply) == _comparable(recorded["json"])


@pytest.mark.parametrize("name", sorted(CONTROL))
async def test_a_recorded_control_request_has_the_real_ones_status(sglang: Starlette, name: str) -> None:
    status, _ = await _replay(sglang, name)
    assert status == CAPTURES[name]["response"]["status"]


async def test_the_last_id_is_shown_as_zero_with_its_own_logprob(sglang: Starlette) -> None:
    body = CAPTURES["gen_last_vocab_id"]["request"]["body"] | {"token_ids_logprob": [2047]}
    async with client(sglang) as http:
        meta = (await http.post("/generate", json=body)).json()["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == [5, 0, 100, 2046, 7, 0]
    for row in (1, 5):
        assert meta["input_token_logprobs"][row][0] == pytest.approx(meta["input_token_ids_logprobs"][row][0][0])


async def test_a_seed_changes_nothing_and_an_unknown_key_of_the_sampling_is_refused(sglang: Starlette) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 1.0, "sampling_seed": 3, "ignore_eos": True}
    async with client(sglang) as http:
        draws = [
            (await http.post("/generate", json={"input_ids": [5], "sampling_params": sampling})).json() for _ in "ab"
        ]
        unknown = await http.post("/generate", json={"input_ids": [5], "sampling_params": {"no_such": 1}})
    assert draws[0]["output_ids"] != draws[1]["output_ids"]
    assert unknown.status_code == 400
    assert isinstance(unknown.json()["error"], str)


async def test_a_reload_renames_the_model(sglang: Starlette, models: Path) -> None:
    async with client(sglang) as http:
        for folder in ("updated", "policy"):
            body = {"model_path": str(models / folder), "weight_version": "v"}
            assert (await http.post("/update_weights_from_disk", json=body)).json()["success"]
            assert (await http.get("/v1/models")).json()["data"][0]["id"] == str(models / folder)
            assert (await http.get("/model_info")).json()["served_model_name"] == str(models / folder)
