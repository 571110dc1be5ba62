"""The embedded server has a real vLLM's shapes, statuses and words: every recorded request is replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.contract.adapters import make_adapter
from tests.serve.apps import NAME, client, make_app
from tests.serve.captures import differences, load, names

EXCLUDED = {
    "d5_generate_prompt_logprob_token_ids": "a model runner without candidates; here they work as in the v captures",
    "w10b_recover": "a mismatched checkpoint poisons a real worker; this server checks before it touches a weight",
}
# The embedded server's own words where it knows more than vLLM says; matched by what a client can rely on.
FAILED = "Call to collective_rpc method failed: Worker failed with error '"
OWN_WORDS = {
    "w7_bad_path": FAILED + "no checkpoint folder (weights_path=",
    "w10_shape_mismatch": FAILED + "the checkpoint is of another architecture: ",
    "w14_unknown_rpc": FAILED + "'Worker' object has no attribute 'nope''",
}


def _mine(value: Any, paths: dict[str, str]) -> Any:
    """A recorded value with the recorded server's model name and folders replaced by ours."""
    text = json.dumps(value)
    for theirs, ours in paths.items():
        text = text.replace(json.dumps(theirs), json.dumps(ours))
    return json.loads(text)


async def _replay(
    app: Starlette, name: str, headers: dict[str, str] | None = None, **paths: str
) -> tuple[httpx.Response, dict]:
    recorded = load(name)
    request = recorded["request"]
    body = _mine(request["json"], paths)
    theirs = (request["json"] or {}).get("model")
    if isinstance(body, dict) and theirs and theirs != "nope":
        body["model"] = NAME
    async with client(app, headers=headers) as http:
        reply = await http.request(request["method"], request["path"], json=body)
    return reply, recorded


def _check(name: str, reply: httpx.Response, recorded: dict[str, Any]) -> None:
    want = recorded["response"]
    assert reply.status_code == want["status"], reply.text[:500]
    kind = (reply.headers.get("content-type") or "").split(";")[0]
    if want["content_type"] is not None:
        assert kind == want["content_type"]
    if not isinstance(want["body"], dict):
        assert reply.text == want["body"]
        return
    got, body = reply.json(), want["body"]
    if name in OWN_WORDS:
        assert got["error"]["message"].startswith(OWN_WORDS[name])
        body["error"]["message"] = got["error"]["message"]
    if "model" in body:
        body["model"] = NAME
    if "error" in body and isinstance(body["error"], dict):
        message = body["error"]["message"]
        body["error"]["message"] = message.replace("Valid aliases: teacher.", f"Valid aliases: {NAME}.")
    request = recorded["request"]["json"] or {}
    text_prompt = isinstance(request.get("prompt"), str) or "messages" in request
    if text_prompt and "usage" in body:
        assert got["usage"]["total_tokens"] == got["usage"]["prompt_tokens"] + got["usage"]["completion_tokens"]
    assert differences(got, body, text_prompt=text_prompt) == []


PLAIN = [name for name in names(r"[abcdev]\d|info|x[^1]") if name not in EXCLUDED]


@pytest.mark.parametrize("name", PLAIN)
async def test_a_recorded_request_is_answered_in_the_recorded_shape(app: Starlette, name: str):
    _check(name, *await _replay(app, name))


@pytest.fixture(scope="module")
def processed(models: Path) -> Iterator[Starlette]:
    app = make_app(models / "policy", logprobs_mode="processed_logprobs")
    yield app
    app.state.served.engine.stop()


@pytest.mark.parametrize("name", names(r"f\d"))
async def test_processed_logprobs_have_the_recorded_shape_and_sentinels(processed: Starlette, name: str):
    _check(name, *await _replay(processed, name))


async def test_weights_change_as_recorded(models: Path):
    app = make_app(models / "policy")
    folders = {
        "models/student": str(models / "policy"),
        "models/student_v2": str(models / "updated"),
        "models/sync_dir": str(models / "updated"),
        "models/teacher": str(models / "wide"),
        "models/nope": str(models / "nope"),
    }
    order = ["w1_weight_info", "w2_collective_rpc_reload_path", "w3_reset_prefix_cache", "w3b_update_weight_version"]
    order += ["w3c_weight_info", "w4_pause", "w4c_reload", "w4d_resume", "w5_reload_no_args", "w6_sleep"]
    order += ["w6b_is_sleeping", "p1_wake", "w6d_is_sleeping", "p1_sleep_req", "p1_wake", "w7_bad_path"]
    order += ["w7b_health_after_bad", "w8b_reload_good", "w9_reload_sync", "w10_shape_mismatch", "w12_update_weights"]
    order += ["w12b_start_weight_update", "w14_unknown_rpc"]
    assert {*order, "w13_lora_disabled", "w10b_recover"} == set(names(r"[wp]\d"))
    for name in order:
        _check(name, *await _replay(app, name, **folders))
    app.state.served.engine.stop()


async def test_adapters_come_and_go_as_recorded(models: Path, tmp_path: Path):
    app = make_app(models / "policy")
    folders = {f"models/lora_{x}": str(make_adapter(models / "policy", tmp_path / x, seed=7)) for x in "ab"}
    order = names(r"l\d")
    assert len(order) == 6
    for name in order:
        _check(name, *await _replay(app, name, **folders))
    app.state.served.engine.stop()


async def test_adapters_are_refused_as_recorded_when_switched_off(models: Path):
    app = make_app(models / "policy", enable_lora=False)
    _check("w13_lora_disabled", *await _replay(app, "w13_lora_disabled"))
    app.state.served.engine.stop()


async def test_the_key_is_asked_for_as_recorded(models: Path):
    app = make_app(models / "policy", api_key="sk-right")
    headers = {"x1b_bad_api_key": {"Authorization": "Bearer wrong"}}
    for name in names("x1"):
        _check(name, *await _replay(app, name, headers.get(name)))
    app.state.served.engine.stop()


def test_every_recorded_reply_is_replayed_or_left_out_for_a_reason():
    replayed = {*PLAIN, *names(r"[fwpl]\d"), *names("x1")}
    assert set(names(".*")) - replayed == set(EXCLUDED) - set(names(r"w"))
