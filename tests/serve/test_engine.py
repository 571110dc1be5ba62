"""The model thread under load: batching is not seen in the numbers, queues are bounded, abandoned work stops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from starlette.applications import Starlette

from tests.contract.adapters import make_adapter, merge_adapter
from tests.serve.apps import NAME, client, complete, exact_logp, make_app, post, random_ids

LONG = {"max_tokens": 4000, "temperature": 1.0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def fresh(models: Path) -> Iterator[Starlette]:
    """A server of its own, for tests that pause, fill or break it."""
    app = make_app(models / "policy", max_queue=4)
    yield app
    app.state.served.engine.stop()


async def _until(condition, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


async def test_scores_do_not_depend_on_what_else_is_in_the_batch(app: Starlette):
    prompts = [random_ids(n, seed=n) for n in (3, 120, 17, 64, 9, 33, 5, 80, 2, 250)]

    async def score(ids: list[int]) -> dict[str, float]:
        [choice] = await complete(app, ids, prompt_logprobs=4)
        rows = enumerate(choice["prompt_logprobs"][1:])
        return {f"{i}:{key}": entry["logprob"] for i, row in rows for key, entry in row.items()}

    alone = [await score(ids) for ids in prompts]
    sizes: list[int] = []
    backbone = app.state.served.engine.backbone
    hidden = backbone.hidden
    backbone.hidden = lambda ids, **cache: sizes.append(len(ids)) or hidden(ids, **cache)
    together = await asyncio.gather(*(score(ids) for ids in prompts))
    backbone.hidden = hidden
    assert max(sizes) > 1, "nothing was batched"
    for one, other in zip(alone, together, strict=True):
        assert len(one.keys() ^ other.keys()) <= 2, "only ids tied at the edge of a list may differ"
        for key in one.keys() & other.keys():
            assert other[key] == pytest.approx(one[key], abs=2e-5)


async def test_a_full_queue_is_a_503_and_the_server_goes_on(fresh: Starlette):
    async with client(fresh) as http:
        await http.post("/pause?mode=keep")
        body = {"model": NAME, "prompt": [9, 10], "max_tokens": 1}
        waiting = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(4)]
        await _until(lambda: fresh.state.served.engine.load == (0, 4))
        refused = await http.post("/v1/completions", json=body)
        assert refused.status_code == 503
        error = refused.json()["error"]
        assert error["code"] == 503
        assert "4 requests are waiting" in error["message"]
        await http.post("/resume")
        assert [reply.status_code for reply in await asyncio.gather(*waiting)] == [200] * 4
        assert (await http.post("/v1/completions", json=body)).status_code == 200


async def test_a_paused_server_lets_requests_wait_or_refuses_them_as_it_is_set_up(models: Path, fresh: Starlette):
    body = {"model": NAME, "prompt": [9, 10], "max_tokens": 1}
    refusing = make_app(models / "policy", when_paused="refuse")
    async with client(refusing) as http:
        await http.post("/pause?mode=keep")
        reply = await http.post("/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["message"]) == (
            503,
            "Generation is paused. Please retry after it resumes.",
        )
        assert "retry-after" not in reply.headers
        await http.post("/resume")
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    refusing.state.served.engine.stop()
    async with client(fresh) as http:
        await http.post("/pause?mode=keep")
        waiting = asyncio.create_task(http.post("/v1/completions", json=body))
        await _until(lambda: fresh.state.served.engine.load == (0, 1))
        await http.post("/resume")
        assert (await waiting).status_code == 200


async def test_cancelled_waiters_make_room(fresh: Starlette):
    engine = fresh.state.served.engine
    async with client(fresh) as http:
        await http.post("/pause?mode=keep")
        body = {"model": NAME, "prompt": [9, 10], "max_tokens": 1}
        waiting = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(4)]
        await _until(lambda: engine.load == (0, 4))
        for task in waiting[:2]:
            task.cancel()
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        more = asyncio.create_task(http.post("/v1/completions", json=body))
        await _until(lambda: engine.load == (0, 3))
        await http.post("/resume")
        replies = await asyncio.gather(*waiting[2:], more)
        assert [reply.status_code for reply in replies] == [200] * 3


async def test_a_cancelled_request_stops_its_generation(fresh: Starlette):
    engine = fresh.state.served.engine
    task = asyncio.create_task(complete(fresh, [9, 10], n=4, **LONG))
    await _until(lambda: engine.drawn_tokens > 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await _until(lambda: engine.load == (0, 0))
    drawn = engine.drawn_tokens
    await asyncio.sleep(0.1)
    assert engine.drawn_tokens == drawn < 16_000
    assert len(await complete(fresh, [9, 10])) == 1


async def test_a_score_does_not_wait_for_a_long_generation(fresh: Starlette):
    engine = fresh.state.served.engine
    task = asyncio.create_task(complete(fresh, [9, 10], **LONG))
    await _until(lambda: engine.drawn_tokens > 5)
    await complete(fresh, random_ids(20), prompt_logprobs=1)
    assert not task.done()
    assert engine.load == (1, 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_pass_that_fails_is_a_500_of_its_own_requests_only(fresh: Starlette):
    backbone = fresh.state.served.engine.backbone
    hidden = backbone.hidden

    def failing(ids: torch.Tensor, **cache: object) -> torch.Tensor:
        if ids.shape[1] == 7:
            raise RuntimeError("out of memory, say")
        return hidden(ids, **cache)

    backbone.hidden = failing
    async with client(fresh) as http:
        body = {"model": NAME, "max_tokens": 1}
        replies = await asyncio.gather(
            *(http.post("/v1/completions", json={**body, "prompt": random_ids(n)}) for n in (7, 60, 3))
        )
    backbone.hidden = hidden
    by_status = sorted(reply.status_code for reply in replies)
    assert by_status[0] == 200
    assert by_status[-1] == 500
    assert "out of memory, say" in replies[0].json()["error"]["message"]
    assert len(await complete(fresh, random_ids(7))) == 1


async def test_weights_changed_under_a_running_draw_rebuild_its_cache(models: Path):
    """Tokens before the change are the old weights', tokens after it the new ones', each exact, none in between."""
    app = make_app(models / "policy")
    engine = app.state.served.engine
    hidden, paused = engine.backbone.hidden, threading.Event()

    def held(ids: torch.Tensor, **cache: object) -> torch.Tensor:
        assert engine.drawn_tokens <= 30 or paused.wait(240)  # it draws no further before the pause has come
        return hidden(ids, **cache)

    engine.backbone.hidden = held
    prompt = random_ids(20, seed=9)
    task = asyncio.create_task(
        post(
            app,
            "/inference/v1/generate",
            {
                "model": NAME,
                "token_ids": prompt,
                "sampling_params": {"max_tokens": 400, "seed": 1, "logprobs": 0, "ignore_eos": True},
            },
        )
    )
    await _until(lambda: engine.drawn_tokens > 30)
    async with client(app) as http:
        pausing = asyncio.create_task(http.post("/pause?mode=keep"))
        await _until(lambda: engine.paused)
        paused.set()
        await pausing
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(models / "updated")}}
        assert (await http.post("/collective_rpc", json=rpc)).status_code == 200
        await http.post("/update_weight_version", json={"new_version": "step-1"})
        await http.post("/resume")
    [choice] = (await task)["choices"]
    spans = choice["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "step-1"]
    turn, tokens = spans[0]["end"], choice["token_ids"]
    assert turn == 32, "the token that was under way, and no other"
    old, new = (exact_logp(models / name, prompt + tokens)[len(prompt) - 1 :] for name in ("policy", "updated"))
    for position, (token, entry) in enumerate(zip(tokens, choice["logprobs"]["content"], strict=True)):
        row = (old if position < turn else new)[position]
        assert entry["logprob"] == pytest.approx(row[token], abs=2e-4)
    engine.stop()


async def test_adapters_and_the_base_run_side_by_side_each_exact(models: Path, tmp_path: Path):
    app = make_app(models / "policy")
    exact = {NAME: models / "policy"}
    for seed, name in ((11, "a"), (12, "b")):
        adapter = make_adapter(models / "policy", tmp_path / name, seed=seed)
        async with client(app) as http:
            body = {"lora_name": name, "lora_path": str(adapter)}
            reply = await http.post("/v1/load_lora_adapter", json=body)
            assert reply.status_code == 200, reply.text
        exact[name] = _merged(models / "policy", adapter, tmp_path / f"{name}-merged")

    async def draw(model: str, seed: int) -> None:
        prompt = random_ids(10 + seed, seed=seed)
        fields = {"model": model, "max_tokens": 20, "seed": seed, "logprobs": 0, "prompt_logprobs": 0}
        [choice] = await complete(app, prompt, ignore_eos=True, return_token_ids=True, **fields)
        rows = exact_logp(exact[model], prompt + choice["token_ids"])
        got = [next(iter(row.values()))["logprob"] for row in choice["prompt_logprobs"][1:]]
        got += choice["logprobs"]["token_logprobs"]
        tokens = [*prompt, *choice["token_ids"]][1:]
        want = [row[token] for row, token in zip(rows, tokens, strict=False)]
        assert got == pytest.approx(want, abs=1e-4)

    await asyncio.gather(*(draw(model, seed) for seed, model in enumerate([NAME, "a", "b", "a", NAME, "b"])))
    app.state.served.engine.stop()


def _merged(base: Path, adapter: Path, out: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merge_adapter(model, adapter)
    model.save_pretrained(out)
    return out


async def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing_behind(models: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    app = make_app(models / "policy")
    good = make_adapter(models / "policy", tmp_path / "good", seed=11)
    prompt = random_ids(12)
    before = (await complete(app, prompt, prompt_logprobs=2))[0]["prompt_logprobs"]
    file = good / "adapter_model.safetensors"
    factors = load_file(file)
    async with client(app) as http:
        for name, damaged in (
            ("short", dict(list(factors.items())[2:])),
            ("renamed", {key.replace("layers.1", "layers.9"): value for key, value in factors.items()}),
            ("misshaped", {key: value[:, :-1].contiguous() for key, value in factors.items()}),
        ):
            save_file(damaged, file, metadata={"format": "pt"})
            reply = await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(good)})
            assert reply.status_code == 500, name
            assert len((await http.get("/v1/models")).json()["data"]) == 1
        save_file(factors, file, metadata={"format": "pt"})
        reply = await http.post("/v1/load_lora_adapter", json={"lora_name": "good", "lora_path": str(good)})
        assert reply.status_code == 200, reply.text
    assert (await complete(app, prompt, prompt_logprobs=2))[0]["prompt_logprobs"] == before
    tuned = await complete(app, prompt, model="good", prompt_logprobs=2)
    assert tuned[0]["prompt_logprobs"] != before
    app.state.served.engine.stop()


async def test_unloading_an_adapter_aborts_its_running_work(models: Path, tmp_path: Path):
    app = make_app(models / "policy")
    adapter = make_adapter(models / "policy", tmp_path / "a", seed=11)
    async with client(app) as http:
        await http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(adapter)})
        task = asyncio.create_task(complete(app, [9, 10], model="a", **LONG))
        await _until(lambda: app.state.served.engine.drawn_tokens > 10)
        assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 200
    [choice] = await task
    assert choice["finish_reason"] == "abort"
    assert 10 <= len(choice["token_ids"]) < 4000
    app.state.served.engine.stop()


async def test_a_checkpoint_that_does_not_fit_changes_nothing(fresh: Starlette, models: Path):
    prompt = random_ids(12)
    before = await complete(fresh, prompt, prompt_logprobs=2)
    async with client(fresh) as http:
        for name in ("wide", "nothing-here"):
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(models / name)}}
            assert (await http.post("/collective_rpc", json=rpc)).status_code == 500
    after = await complete(fresh, prompt, prompt_logprobs=2)
    assert after[0]["prompt_logprobs"] == before[0]["prompt_logprobs"]


async def test_a_stopped_engine_answers_what_it_held_as_aborted_and_can_start_again(fresh: Starlette):
    engine = fresh.state.served.engine
    task = asyncio.create_task(complete(fresh, [9, 10], **LONG))
    await _until(lambda: engine.drawn_tokens > 5)
    engine.stop()
    [choice] = await task
    assert choice["finish_reason"] == "abort"
    assert len(await complete(fresh, [9, 10])) == 1


async def test_the_api_key_guards_everything_that_costs_or_changes(models: Path):
    app = make_app(models / "policy", api_key="sk-right")
    closed = ["/v1/models", "/load", "/weight_info", "/is_paused"]
    posts = [
        "/v1/completions",
        "/v1/chat/completions",
        "/inference/v1/generate",
        "/tokenize",
        "/collective_rpc",
        "/pause",
    ]
    async with client(app) as http:
        for path in ("/health", "/ping", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200
        for wrong in (
            {},
            {"Authorization": "Bearer sk-wrong"},
            {"Authorization": "sk-right"},
            {"X-Api-Key": "sk-right"},
        ):
            for path in closed:
                assert (await http.get(path, headers=wrong)).status_code == 401
            for path in posts:
                assert (await http.post(path, json={}, headers=wrong)).status_code == 401
        right = {"Authorization": "Bearer sk-right"}
        assert (await http.get("/v1/models", headers=right)).status_code == 200
        twice = [("Authorization", "Bearer sk-right"), ("Authorization", "Bearer sk-right")]
        assert (await http.get("/v1/models", headers=twice)).status_code == 401
    assert "sk-right" not in repr(app.state.served.config)


async def test_weight_routes_are_not_offered_to_a_network_without_a_key(models: Path):
    for options, status in (({"host": "0.0.0.0"}, 404), ({"host": "0.0.0.0", "api_key": "k"}, 200), ({}, 200)):
        app = make_app(models / "policy", **options)
        async with client(app, headers={"Authorization": "Bearer k"}) as http:
            assert (await http.get("/weight_info")).status_code == status


async def test_bodies_that_are_too_large_or_not_json_are_refused(models: Path):
    app = make_app(models / "policy", max_body_bytes=2000)
    async with client(app) as http:
        large = await http.post("/v1/completions", json={"model": NAME, "prompt": "x" * 3000})
        assert large.status_code == 413
        assert "2000 bytes" in large.json()["error"]["message"]
        for raw in (b"{", b"[1]", b"\xff", b"null"):
            reply: httpx.Response = await http.post("/v1/completions", content=raw)
            assert reply.status_code == 400
            assert reply.json()["error"]["type"] == "Bad Request"


async def test_tokenize_and_detokenize_agree_with_the_tokenizer(app: Starlette):
    words = app.state.served.words
    text = "def get(self, key):\n    return é"
    body = await post(app, "/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True})
    assert body["tokens"] == words.tokenizer.encode(text)
    assert body["token_strs"] == words.tokenizer.convert_ids_to_tokens(body["tokens"])
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 4096)
    assert (await post(app, "/detokenize", {"model": NAME, "tokens": body["tokens"]}))["prompt"] == text
    chat = await post(app, "/tokenize", {"model": NAME, "messages": [{"role": "user", "content": "hi"}]})
    assert words.decode(chat["tokens"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = body["tokens"]
    assert "".join(words.text(token, ids[:place]) for place, token in enumerate(ids)) == text
