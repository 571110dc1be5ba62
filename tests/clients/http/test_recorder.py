"""A recording holds the bytes that went over the wire, and of keys nothing in any form."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from tests.clients.probing import served
from tests.clients.vllm_toy import VllmToy
from topkd.clients.config import ClientConfig
from topkd.clients.dialects.base import HttpClient, Wire
from topkd.clients.http import recorder as recording
from topkd.clients.http.masking import SecretMask
from topkd.clients.http.recorder import RecordedExchange, Recorder, compact_json, indent_json, read_exchange
from topkd.clients.http.transport import HttpTransport, Reply, Request
from topkd.clients.probe.probe import probe
from topkd.topk.errors import AuthError, ConfigError, ServerUnreachableError

KEY = "k3y/With+odd=chars&<more>~42"
ONCE = ClientConfig(max_retries=0, response_retries=0, backoff_s=0.0)


class Answering:
    """A transport that gives one reply."""

    def __init__(self, reply: Reply | Exception) -> None:
        self.reply, self.closed = reply, 0

    async def send(self, request: Request) -> Reply:
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    async def aclose(self) -> None:
        self.closed += 1


def _everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() + path.name.encode() for path in sorted(folder.iterdir()))


async def _record(folder: Path, reply: Reply | Exception, **request: Any) -> RecordedExchange:
    recorder = Recorder(folder, Answering(reply))
    sent = Request(**({"method": "GET", "url": "http://h:1/v1/models"} | request))
    if isinstance(reply, Exception):
        with pytest.raises(type(reply)):
            await recorder.send(sent)
    else:
        assert await recorder.send(sent) is reply, "the client gets what the server sent"
    await recorder.finish({})
    return read_exchange(min(folder.iterdir()))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"a":[-1e-05,-1E-5,0.10,-0.0,12345678901234567890],"a":"\\u00e9\\/","b":[],"c":{},"d":[[],[{}],[null,true]]}',
        '{"text":"é 東京 🙂, \\" : [ ] { } \\\\"}'.encode(),
        b'{"spaced": [1, 2]}\n',
        b'{"nan":NaN}',
        b"plain text\r\n\ttabs",
        b"\xff\xfe\x00bytes",
        b'"one string"',
        b"17",
    ],
)
async def test_the_recorded_body_is_the_body_byte_for_byte(body: bytes, tmp_path: Path):
    exchange = await _record(tmp_path / "r", Reply(200, {"content-type": "x"}, body), method="POST", content=body)
    assert exchange.reply is not None
    assert exchange.reply.body.content == exchange.request.body.content == body


def test_indented_json_is_readable_and_has_the_same_tokens():
    text = '{"a":1,"rows":[null,{"5":{"logprob":-0.10,"rank":1}}],"ids":[1,2,3],"e":[]}'
    assert indent_json(text) == (
        '{\n "a": 1,\n "rows": [\n  null,\n  {\n   "5": {"logprob": -0.10, "rank": 1}\n  }\n ],\n'
        ' "ids": [1, 2, 3],\n "e": []\n}'
    )
    assert compact_json(indent_json(text).encode()) == text.encode()


async def test_an_exchange_names_method_path_status_and_the_headers_that_matter(tmp_path: Path):
    headers = {"content-type": "application/json", "retry-after": "3", "server": "uvicorn", "date": "now", "etag": "z"}
    reply = Reply(503, headers, b"{}", "http://h:1/moved?x=1")
    exchange = await _record(
        tmp_path / "r", reply, url="http://h:1/base/v1/models?page=2", headers={"content-type": "application/json"}
    )
    assert (exchange.number, exchange.request.method, exchange.request.path) == (1, "GET", "/base/v1/models?page=2")
    assert exchange.request.headers == {"content-type": "application/json"}
    assert exchange.reply is not None
    assert exchange.reply.headers == {"content-type": "application/json", "retry-after": "3", "server": "uvicorn"}
    assert (exchange.reply.status, exchange.reply.path) == (503, "/moved?x=1")
    assert [path.name for path in sorted((tmp_path / "r").iterdir())] == [
        "001-GET-base-v1-models.json",
        "manifest.json",
    ]


def _forms(key: str) -> dict[str, str]:
    """The key as servers, proxies and libraries may write it, made here without the code under test."""
    escaped = json.dumps(key)[1:-1]
    return {
        "plain": key,
        "json": escaped,
        "json with slashes": escaped.replace("/", "\\/"),
        "json in json": json.dumps(escaped.replace("/", "\\/"))[1:-1],
        "json of Go": escaped.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        "html": html.escape(key),
        "url": quote(key, safe=""),
        "url, lower case": "".join(c if c.isalnum() else f"%{ord(c):02x}" for c in key).replace("%7e", "~"),
        "form": quote_plus(key),
        "path": quote(key),
        "hexadecimal": key.encode().hex(),
        "base64": base64.b64encode(key.encode()).decode(),
        "base64 for URLs": base64.urlsafe_b64encode(key.encode()).decode(),
        "basic": base64.b64encode(f"user:{key}".encode()).decode(),
        "basic, shifted": base64.b64encode(f"me:{key}".encode()).decode(),
        "basic, shifted again": base64.b64encode(f"x:{key}:after".encode()).decode(),
    }


@pytest.mark.parametrize("form", _forms(KEY))
async def test_no_form_of_the_key_is_left_wherever_a_server_repeats_it(form: str, tmp_path: Path):
    written = _forms(KEY)[form]
    exchange = await _record(
        tmp_path / "r",
        Reply(401, {"location": f"/login?from={written}", "www-authenticate": written},
              f"<p>no: {written}</p>".encode(), f"http://h:1/login?from={written}"),
        url=f"http://h:1/v1/models?k={written}",
        method="POST", content=json.dumps({"k": written}, separators=(",", ":")).encode(),
        headers={"content-type": "application/json"}, private={"authorization": f"Bearer {KEY}", "x-api-key": KEY},
    )  # fmt: skip
    assert exchange.request.headers["authorization"] == exchange.request.headers["x-api-key"] == "***"
    held = _everything(tmp_path / "r")
    for other in _forms(KEY).values():
        assert other.encode() not in held
    inner = written[4:-4].encode()  # what would be left of it between two masks
    assert inner not in held
    assert held.count(b"***") >= 6


async def test_the_key_is_in_no_error_either(tmp_path: Path):
    error = ServerUnreachableError(f"no connection through http://user:{KEY.replace('/', '')}@proxy", got=KEY)
    exchange = await _record(tmp_path / "r", error, private={"authorization": f"Bearer {KEY}"})
    assert exchange.reply is None
    assert exchange.error.startswith("ServerUnreachableError: no connection through http://***@proxy")
    assert KEY.encode() not in _everything(tmp_path / "r")


SECRET = "hunter2AndSomeMore"


@pytest.mark.parametrize(
    "text",
    [
        '{"api_key":"%s","admin_api_key":null}',
        '{"server_args":"ServerArgs(api_key=\'%s\', port=1)"}',
        '{"dump":"{\\"admin_api_key\\": \\"%s\\"}"}',
        '{"argv":["--api-key","%s","--port","1"]}',
        '{"argv":"vllm serve --hf-token %s --port 1"}',
        '{"argv":"vllm serve --api-key=%s"}',
        '{"keys":{"api_key":["%s","%s"]}}',
        "GET /login?access_token=%s&next=1",
        '{"proxy":"https://user:%s@proxy:80/"}',
        '{"proxy":"https:\\/\\/%s@proxy"}',
        '{"ssl_keyfile_password":"%s"}',
        "authorization: Bearer %s",
        '{"error":"key sk-%s is not known"}',
        '{"error":"token hf_%s is not known"}',
        "DB_PASSWORD=ab,%s port",
        "DB_PASSWORD=ab;c&d)e]%s port",
        "DB_PASSWORD=true,%s",
        "GET /x?a=1&my-api-key=b,c;%s&next=1",
        "x-api-key: %s\r\nport: 1",
        "Authorization: Basic %s\nport: 1",
        "Cookie: session=%s; other=%s\nport: 1",
        "GITHUB_TOKEN=%s port",
        "GET /login?token=%s&next=1",
        '{"env":{"GITHUB_TOKEN":"%s","port":"1"}}',
        '{"api_key":{"value":"%s","more":["%s",{"a":"}%s"}]},"port":1}',
        '{"dump":"{\\"api_key\\": {\\"value\\": \\"}%s\\"}, \\"port\\": 1}"}',
        '{"api_keys":["a]b","%s"],"port":1}',
        '{"credentials":[{"name":"a","value":"%s"}],"port":1}',
        '{"port":1,"api_key":"%s',
        '{"port":1,"api_key":{"value":"%s',
        '{"port":1,"api_key":["a","%s',
    ],
)
def test_a_secret_that_is_not_ours_is_known_by_its_name_or_form(text: str):
    mask = SecretMask()
    shown = mask.hide_text(text.replace("%s", SECRET))
    assert SECRET not in shown
    assert "***" in shown
    assert mask.hidden == 1
    for word in ("port", "next", "proxy", "admin_api_key", "is not known"):
        assert (word in shown) == (word in text), "and nothing else goes with it"


@pytest.mark.parametrize(
    "text",
    [
        '{"api_key":null,"tokens":[1,2],"token_ids":[3],"decoded_token":"secretary","max_tokens":5}',
        '{"hf_chat_template_name":null,"watermark_key":"<redacted>","topic":"sk-learn-and-others"}',
        '{"usage":{"prompt_tokens":3},"token":"user@host","detail":"Unauthorized"}',
        'vllm:prompt_tokens_total{model="t"} 5\napi_key=None',
        "AAAA" * 50_000,
        '{"content":[{"token":"token_id:5","logprob":-0.1,"bytes":null},{"token":"hello","top_logprobs":[]}]}',
        '{"tokens":["a","b"],"bos_token":"<s>","max_tokens":5,"api_key":null,"api_keys":[],"secrets":{}}',
        "Namespace(api_key=None, api_keys=[], hf_token=None, eos_token='</s>')",
        "-" * 20_000 + "api_key",
        "--x" * 1_000 + "api_key",
        "sk-" * 7_000,
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str):
    assert SecretMask().hide_text(text) == text


async def test_a_key_too_short_to_be_masked_is_refused_before_anything_is_sent(tmp_path: Path):
    inner = Answering(Reply(200, {}, b"{}"))
    recorder = Recorder(tmp_path / "r", inner)
    with pytest.raises(ConfigError, match=r"too short to be masked.*expected at least 4"):
        await recorder.send(Request("GET", "http://h:1/", private={"authorization": "Bearer abc"}))
    await recorder.finish({})
    assert not (tmp_path / "r").exists(), "nothing was recorded: the folder can be used again"
    assert inner.closed == 1


async def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"must be new or empty.*got notes.txt.*name another"):
        await probe("http://127.0.0.1:9", record=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="cannot write the recording"):
        await probe("http://127.0.0.1:9", record=tmp_path / "notes.txt")


async def test_a_large_body_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recording, "MOST_BODY_BYTES", 10_000)
    monkeypatch.setattr(recording, "MOST_BYTES", 25_000)
    recorder = Recorder(tmp_path / "r", Answering(Reply(200, {}, b"x" * 9_000)))
    for _ in range(4):
        await recorder.send(Request("GET", "http://h:1/metrics"))
    recorder._transport = Answering(Reply(200, {}, b"y" * 10_001))
    await recorder.send(Request("GET", "http://h:1/metrics"))
    await recorder.finish({})
    kept = [read_exchange(path).reply for path in sorted((tmp_path / "r").glob("0*"))]
    assert [reply and reply.body.size for reply in kept] == [0, 0, 9_000, 9_000, 10_001]
    assert [reply and len(reply.body.text or reply.body.cut) for reply in kept] == [9_000, 9_000, 4096, 4096, 4096]
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["cut"] == 3


@pytest.mark.parametrize("before", [0, 4000, 4085, 4096, 5000])
async def test_a_key_at_the_cut_of_a_body_is_not_left_in_part(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "MOST_BODY_BYTES", 10_000)
    # Masked keys are short: what comes up from behind the cut must be masked as well.
    body = b"x" * before + KEY.encode() * 1000
    exchange = await _record(tmp_path / "r", Reply(200, {}, body), private={"authorization": f"Bearer {KEY}"})
    assert exchange.reply is not None
    kept = exchange.reply.body.cut
    assert kept.startswith("x" * min(before, 2000))
    assert set(kept) <= {"x", "*"}


async def test_a_named_secret_longer_than_what_is_read_of_a_cut_body_is_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "MOST_BODY_BYTES", 10_000)
    exchange = await _record(tmp_path / "r", Reply(200, {}, b'{"api_key":"' + b"s3cret" * 5000 + b'"}'))
    assert exchange.reply is not None
    assert "s3cret" not in exchange.reply.body.cut
    assert exchange.reply.body.size == 30_014


async def test_lists_too_deep_to_be_read_are_recorded_as_text(tmp_path: Path):
    exchange = await _record(tmp_path / "r", Reply(200, {}, b"[" * 3000))
    assert exchange.reply is not None
    assert exchange.reply.body.text == "[" * 3000


async def test_a_probe_is_recorded_whole_and_its_report_is_the_same(tmp_path: Path):
    seen: list[tuple[str, str]] = []
    toy = VllmToy(limit=24)

    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        seen.append((method, path))
        return toy(method, path, body)

    with served(handler) as url:
        report = await probe(url, record=tmp_path / "r", api_key=KEY)
        recorded = [read_exchange(path) for path in sorted((tmp_path / "r").glob("0*"))]
        assert [(e.request.method, e.request.path) for e in recorded] == seen
        assert [e.number for e in recorded] == list(range(1, len(seen) + 1))
        manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
        assert manifest["report"] == json.loads(json.dumps(report.as_json()))
        assert (manifest["dialect"], manifest["version"], manifest["url"]) == ("vllm_generate", "0.32.0", url)
        assert (manifest["exchanges"], manifest["cut"], manifest["format"]) == (len(seen), 0, 1)
        assert KEY.encode() not in _everything(tmp_path / "r")
        assert all(e.request.headers["authorization"] == "***" for e in recorded)
        for refused in ("load", "cached"):
            with pytest.raises(ConfigError, match=f"--record with --{refused}; leave one"):
                await probe(url, record=tmp_path / "other", **{refused: True})
    assert not (tmp_path / "other").exists()


async def test_a_probe_that_fails_leaves_what_was_said_so_far(tmp_path: Path):
    def handler(method: str, path: str, body: Any) -> tuple[int, Any]:
        return 401, {"error": f"no such key: {KEY}"}

    with served(handler) as url, pytest.raises(AuthError):
        await probe(url, record=tmp_path / "r", api_key=KEY, config=ONCE)
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["error"].startswith("AuthError: the server refuses the API key")
    assert manifest["exchanges"] == len(list((tmp_path / "r").glob("0*"))) > 0
    assert KEY.encode() not in _everything(tmp_path / "r")


async def test_clients_that_share_a_recorder_do_not_close_it(tmp_path: Path):
    with served(lambda *_: (200, {"data": [{"id": "t"}]})) as url:
        recorder = Recorder(tmp_path / "r", HttpTransport(ONCE))
        for _ in range(2):
            async with HttpClient(url, config=ONCE, transport=recorder) as client:
                assert await Wire(client).get("/v1/models") == {"data": [{"id": "t"}]}
        await recorder.finish({})
        with pytest.raises(ConfigError, match="closed"):
            await recorder.send(Request("GET", url))
