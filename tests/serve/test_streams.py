"""Streams of completions: the joined chunks are the reply that is not streamed, and they come as tokens are drawn."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.serve.apps import NAME, client, make_app, post, random_ids
from topkd.serve.engine.jobs import EngineJob, SamplingJob
from topkd.serve.engine.refusal import Refusal
from topkd.serve.routes.streaming import JobStream

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "x"}


@pytest.fixture
def fresh(models: Path) -> Iterator[Starlette]:
    """A server of its own, for tests that pause, fill or break it."""
    app = make_app(models / "policy", max_queue=2)
    yield app
    app.state.served.engine.stop()


def _events(text: str) -> list[dict[str, Any]]:
    """The bodies of a stream's events, which end in [DONE]."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def _stream(app: Starlette, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client(app) as http:
        reply = await http.post(path, json={"model": NAME, **body, "stream": True})
    assert reply.status_code == 200, reply.text[:300]
    assert reply.headers["content-type"].startswith("text/event-stream")
    return _events(reply.text)


def _join(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What all chunks of each choice say together, under the names that a whole reply has."""
    joined: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = joined.setdefault(choice["index"], {"text": "", "logprobs": None, "token_ids": None, "ended": 0})
        delta = choice.get("delta", {})
        assert not whole["ended"], "a chunk after the last one"
        whole["text"] += choice.get("text", delta.get("content", ""))
        whole["ended"] += choice["finish_reason"] is not None
        whole |= {name: choice[name] for name in ("finish_reason", "stop_reason", "weight_versions") if name in choice}
        for name, value in (choice["logprobs"] or {}).items():
            whole["logprobs"] = whole["logprobs"] or {}
            whole["logprobs"][name] = whole["logprobs"].get(name, []) + value
        if choice.get("token_ids") is not None:
            whole["token_ids"] = (whole["token_ids"] or []) + choice["token_ids"]
        if choice.get("prompt_token_ids") is not None:
            assert "prompt_token_ids" not in whole
            whole["prompt_token_ids"] = choice["prompt_token_ids"]
    return joined


def _agrees(joined: dict[int, dict[str, Any]], reply: dict[str, Any]) -> None:
    assert len(joined) == len(reply["choices"])
    for choice in reply["choices"]:
        whole = joined[choice["index"]]
        assert whole.pop("ended") == 1
        want = {**choice, "text": choice.get("text", (choice.get("message") or {}).get("content"))}
        for name, value in whole.items():
            assert value == want[name], name


DRAWS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 1},
    {"max_tokens": 9, "n": 3, "temperature": 1.3, "return_token_ids": True},
    {"max_tokens": 40, "stop": ["e", "the "], "temperature": 1.2},
    {"max_tokens": 40, "stop": ["ing", "e"], "include_stop_str_in_output": True, "min_tokens": 5},
    {"max_tokens": 12, "skip_special_tokens": False, "ignore_eos": True, "n": 2},
    {"max_tokens": 6, "return_weight_versions": True},
]


@pytest.mark.parametrize("fields", DRAWS)
async def test_the_joined_chunks_of_a_completion_are_the_reply_that_is_not_streamed(app: Starlette, fields: dict):
    body = {"prompt": [random_ids(5), random_ids(9, seed=1)], "seed": 11, "logprobs": 2, **fields}
    chunks = await _stream(app, COMPLETIONS, body)
    reply = await post(app, COMPLETIONS, {"model": NAME, **body})
    _agrees(_join(chunks), reply)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["object"] == "text_completion" and "usage" not in chunk for chunk in chunks)
    lasts = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert all(("system_fingerprint" in chunk) == (chunk in lasts) for chunk in chunks)


@pytest.mark.parametrize("fields", DRAWS)
async def test_the_joined_chunks_of_a_chat_are_the_reply_that_is_not_streamed(app: Starlette, fields: dict):
    body = {"messages": [USER], "seed": 11, "logprobs": True, "top_logprobs": 2, **fields}
    chunks = await _stream(app, CHAT, body)
    reply = await post(app, CHAT, {"model": NAME, **body})
    for index in range(fields.get("n", 1)):  # the role comes first, once for each choice
        [choice] = chunks[index]["choices"]
        assert (choice["index"], choice["delta"]) == (index, {"role": "assistant", "content": ""})
        assert choice["finish_reason"] is None
    assert chunks[0]["prompt_token_ids"] == reply["prompt_token_ids"]
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[fields.get("n", 1) :])
    _agrees(_join(chunks), reply)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"max_tokens": 3}, {"max_tokens": 3, "return_token_ids": True}])
async def test_an_echoed_prompt_is_in_the_first_chunk_with_its_rows(app: Starlette, fields: dict):
    body = {"prompt": [[20, 21, 22], [30, 31]], "n": 2, "echo": True, "logprobs": 2, "seed": 5, **fields}
    chunks = await _stream(app, COMPLETIONS, body)
    reply = await post(app, COMPLETIONS, {"model": NAME, **body})
    joined = _join(chunks)
    rows = [len(joined[choice]["logprobs"]["tokens"]) for choice in range(4)]
    assert rows == [3 + fields["max_tokens"]] * 2 + [2 + fields["max_tokens"]] * 2
    _agrees(joined, reply)


async def test_characters_that_several_tokens_make_come_whole(app: Starlette):
    served = app.state.served
    words = served.words
    text = "a – b 🙂 漢字 c"
    ids = words.encode(text, add_special_tokens=False)
    sequence = _sequence(served, ids)
    grown = served.endings.grow(sequence)
    pieces = [grown.take(count) for count in range(1, len(ids) + 1)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces, "no character here is split"


def _sequence(served: Any, ids: list[int], **sampling: Any) -> Any:
    """A completion in progress that has drawn these ids."""
    from topkd.serve.engine.sequences import GeneratedSequence

    job = EngineJob((9, 10), SamplingJob(**sampling))
    sequence = GeneratedSequence(job, 0, 100, frozenset(), None)  # type: ignore[arg-type]
    sequence.out.token_ids += ids
    return sequence


async def test_what_is_streamed_of_any_tokens_is_the_beginning_of_their_text(app: Starlette):
    served = app.state.served
    for seed in range(40):
        ids = random_ids(12, seed=seed)
        sequence = _sequence(served, ids)
        grown = served.endings.grow(sequence)
        taken = "".join(grown.take(count) for count in range(1, 13, 1 + seed % 3))
        whole = served.endings.text((9, 10), ids)
        assert taken + grown.finish(whole) == whole


async def test_what_may_begin_a_stop_string_is_held_back(app: Starlette):
    served = app.state.served
    ids = served.words.encode("abcabd", add_special_tokens=False)
    grown = served.endings.grow(_sequence(served, ids, stop=("abd",)))
    assert "".join(grown.take(count) for count in range(1, len(ids) + 1)) == "abca"
    assert grown.finish("abc" + "ab") == "b"


def test_a_text_that_changes_is_an_error_and_not_a_wrong_text(app: Starlette):
    served = app.state.served
    grown = served.endings.grow(_sequence(served, served.words.encode("abc abc abc", add_special_tokens=False)))
    assert grown.take(3)
    with pytest.raises(Refusal, match="changes as tokens follow"):
        grown.finish("another text")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(app: Starlette, path: str):
    body = {"prompt": [9, 10]} if path == COMPLETIONS else {"messages": [USER]}
    body |= {"max_tokens": 4, "ignore_eos": True, "n": 2, "temperature": 1}
    *chunks, last = await _stream(app, path, {**body, "stream_options": {"include_usage": True}})
    reply = await post(app, path, {"model": NAME, **body})
    assert last["choices"] == []
    assert last["usage"] == {name: value for name, value in reply["usage"].items() if value is not None}
    assert "system_fingerprint" in last
    assert all("usage" not in chunk and "system_fingerprint" not in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = await _stream(app, path, {**body, "stream_options": options})
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"][0]["index"] == 1]
    assert counted == sorted(counted)
    assert counted[-1] == 4


async def test_options_of_a_stream_without_a_stream_are_refused(app: Starlette):
    body = {"model": NAME, "prompt": [9], "stream_options": {"include_usage": True}}
    async with client(app) as http:
        reply = await http.post(COMPLETIONS, json=body)
        scores = await http.post(COMPLETIONS, json={"model": NAME, "prompt": [9], "stream": True, "prompt_logprobs": 1})
    assert reply.status_code == 400
    assert "Stream options can only be defined when `stream=True`." in reply.json()["error"]["message"]
    assert scores.status_code == 400
    assert "`prompt_logprobs` are not available when `stream=True`." in scores.json()["error"]["message"]


async def test_a_full_queue_is_a_503_before_a_stream_begins(fresh: Starlette):
    engine = fresh.state.served.engine
    async with client(fresh) as http:
        await http.post("/pause?mode=keep")
        body = {"model": NAME, "prompt": [9, 10], "max_tokens": 1, "stream": True}
        waiting = [asyncio.create_task(http.post(COMPLETIONS, json=body)) for _ in range(2)]
        await _until(lambda: engine.load == (0, 2))
        refused = await http.post(COMPLETIONS, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
        await http.post("/resume")
        assert [len(_events(reply.text)) for reply in await asyncio.gather(*waiting)] == [1, 1]


async def test_a_draw_that_is_aborted_ends_its_stream_as_such(fresh: Starlette):
    engine = fresh.state.served.engine
    async with client(fresh) as http:
        body = {"prompt": [9, 10], "max_tokens": 4000, "ignore_eos": True, "return_token_ids": True}
        task = asyncio.create_task(_stream(fresh, COMPLETIONS, body))
        await _until(lambda: engine.drawn_tokens > 5)
        await http.post("/pause?mode=abort")
        [whole] = _join(await task).values()
        await http.post("/resume")
    assert whole["finish_reason"] == "abort"
    assert len(whole["token_ids"]) > 5


class _Connection:
    """A client that reads a stream's chunks as they are sent, and may disconnect."""

    def __init__(self, app: Starlette, path: str, body: dict[str, Any]) -> None:
        self._body = json.dumps({"model": NAME, **body, "stream": True}).encode()
        self.received: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "scheme": "http",
            "server": ("embedded", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        text = message.get("body", b"").decode()
        self.received += [json.loads(part[6:]) for part in text.split("\n\n") if part and "[DONE]" not in part]


async def _until(condition, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)


async def test_a_model_that_fails_in_the_middle_is_an_error_event(fresh: Starlette):
    engine = fresh.state.served.engine
    logits = engine.backbone.logits
    connection = _Connection(fresh, COMPLETIONS, {"prompt": [9, 10], "max_tokens": 4000, "ignore_eos": True})

    def failing(hidden: Any) -> Any:
        if connection.received:
            raise RuntimeError("out of memory, say")
        return logits(hidden)

    engine.backbone.logits = failing
    await connection.task
    *chunks, last = connection.received
    assert all(chunk["choices"] for chunk in chunks)
    assert chunks
    assert last["error"] == {
        "message": "The model failed: RuntimeError: out of memory, say",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert engine.load == (0, 0)


async def test_a_failure_of_two_prompts_is_one_error_and_nothing_in_the_log(
    fresh: Starlette, monkeypatch: pytest.MonkeyPatch
):
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory, say")

    served, logged = fresh.state.served, []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
    monkeypatch.setattr(served.engine.backbone, "hidden", failing)

    async def follow_until_it_fails() -> None:
        stream = JobStream(served, [EngineJob((9, 10), SamplingJob()), EngineJob((11, 12), SamplingJob())])
        await _until(lambda: all(pending.future.done() for pending in stream.pending))
        with pytest.raises(Refusal, match="out of memory, say"):
            [delta async for delta in stream.follow()]
        stream.close()

    await follow_until_it_fails()
    gc.collect()
    assert logged == []


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_tokens_come_as_they_are_drawn_and_a_client_that_disconnects_ends_the_draw(fresh: Starlette, path: str):
    engine = fresh.state.served.engine
    body = {"prompt": [9, 10]} if path == COMPLETIONS else {"messages": [USER]}
    connection = _Connection(fresh, path, {**body, "max_tokens": 4000, "ignore_eos": True})
    await _until(lambda: len(connection.received) >= 5)
    assert engine.load == (1, 0), "what was received was sent before the draw was over"
    connection.gone.set()
    await connection.task
    await _until(lambda: engine.load == (0, 0))
    assert engine.drawn_tokens < 4000
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in connection.received)


async def test_a_client_that_disconnects_while_the_server_is_paused_leaves_the_queue(fresh: Starlette):
    engine = fresh.state.served.engine
    async with client(fresh) as http:
        await http.post("/pause?mode=keep")
        connection = _Connection(fresh, COMPLETIONS, {"prompt": [9, 10], "max_tokens": 4})
        await _until(lambda: engine.load == (0, 1))
        connection.gone.set()
        await connection.task
        await http.post("/resume")
        await _until(lambda: engine.load == (0, 0))
    assert engine.drawn_tokens == 0


async def test_a_slow_reader_gets_all_tokens_in_fewer_chunks(app: Starlette):
    served = app.state.served
    job = EngineJob((9, 10), SamplingJob(max_tokens=200, ignore_eos=True, seed=1))
    stream = JobStream(served, [job])
    deltas = []
    async for delta in stream.follow():
        deltas.append(delta)
        await _until(stream.pending[0].future.done)
    assert [place for delta in deltas for place in delta.drawn] == list(range(200))
    assert len(deltas) <= 3
    assert "".join(delta.text for delta in deltas) == stream.pending[0].future.result().completions[0].text
    stream.close()
