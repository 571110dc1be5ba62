"""Bytes over HTTP: nothing of the HTTP library escapes, keys stay on their host, sizes and times are bounded."""

from __future__ import annotations

import asyncio
import inspect
import ssl

import httpx
import pytest

from tests.clients.probing import served
from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import KEY, VOCAB, FaultyServer
from topkd.clients import ClientConfig, VllmCompletions
from topkd.clients.http.endpoint import normalize_url
from topkd.clients.http.httpx_connections import _connect_error
from topkd.clients.http.transport import HttpTransport, Request
from topkd.topk.errors import (
    ConfigError,
    FinalServerError,
    RequestRefusedError,
    ResponseError,
    ServerTimeoutError,
    ServerUnreachableError,
    TopkdError,
)

QUICK = ClientConfig(max_retries=1, backoff_s=0.01, read_timeout_s=60.0, connect_timeout_s=60.0)
IDS = list(range(30, 60))


def _exceptions() -> list[type[Exception]]:
    return sorted(
        {v for v in vars(httpx).values() if inspect.isclass(v) and issubclass(v, Exception)},
        key=lambda kind: kind.__name__,
    )


def _make(kind: type[Exception]) -> Exception:
    request = httpx.Request("POST", "http://h/")
    for args in (("words",), (), ("words", "ERR")):
        for options in (
            {},
            {"request": request, "response": httpx.Response(500, request=request)},
            {"request": request},
        ):
            try:
                return kind(*args, **options)
            except TypeError:
                continue
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", [*_exceptions(), OSError, ConnectionResetError, ssl.SSLError], ids=lambda k: k.__name__
)
async def test_every_exception_of_the_http_library_leaves_as_one_of_ours(kind, monkeypatch: pytest.MonkeyPatch):
    def explode(*args, **options):
        raise _make(kind)

    monkeypatch.setattr(httpx.AsyncClient, "stream", explode)
    transport = HttpTransport(QUICK)
    with pytest.raises(TopkdError) as caught:
        await transport.send(
            Request("POST", "https://127.0.0.1:1/x", b"{}", private={"authorization": f"Bearer {KEY}"})
        )
    await transport.aclose()
    assert "https://127.0.0.1:1/x" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        (" http://h:8000/v1/ ", "http://h:8000"),
        ("https://h/prefix/v1", "https://h/prefix"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_the_usual_spellings_of_a_base_url_are_one(url: str, clean: str):
    assert normalize_url(url) == clean


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:8000",
        "127.0.0.1:8000",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://h:x",
        "http://h/?a=b",
        "http://[::1",
    ],
)
def test_what_is_no_base_url_is_refused_before_anything_is_sent(url: str):
    with pytest.raises(ConfigError, match="http"):
        normalize_url(url)


@pytest.mark.parametrize("url", ["h:8000", "127.0.0.1:8000", "localhost:8000/v1", "gpu-3.lab"])
def test_a_url_without_its_scheme_is_told_the_whole_one(url: str):
    with pytest.raises(ConfigError, match=f"did you mean http://{url}"):
        normalize_url(url)


async def test_tls_asked_of_a_server_without_it_says_so():
    with served(lambda *_: (200, {})) as url:
        secure = url.replace("http:", "https:")
        async with VllmCompletions(secure, model="t", config=ClientConfig(max_retries=0)) as client:
            with pytest.raises(ServerUnreachableError, match="without TLS, at http://"):
                await client.score(IDS, 3, 4)


def test_a_reply_in_the_clear_is_seen_whatever_openssl_calls_it():
    """3.0 says "wrong version number", 3.2 and later may say "record layer failure"."""
    error = httpx.ConnectError("[SSL] record layer failure (_ssl.c:1000)")
    error.__cause__ = ssl.SSLError(1, "[SSL] record layer failure (_ssl.c:1000)")
    assert "without TLS, at http://" in str(_connect_error(error, "GET https://h"))
    assert "is the server running" in str(_connect_error(httpx.ConnectError("refused"), "GET https://h"))


def test_a_server_that_speaks_tls_and_refuses_the_handshake_is_not_called_one_without():
    """One that wants a client's certificate, or no cipher or version of ours, sends an alert."""
    error = httpx.ConnectError("[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] sslv3 alert handshake failure (_ssl.c:1006)")
    error.__cause__ = ssl.SSLError(1, str(error))
    said = str(_connect_error(error, "GET https://h"))
    assert "want a client's certificate, or another version of TLS?" in said
    assert "without TLS" not in said


@in_virtual_time
async def test_a_server_that_hangs_is_noticed_by_the_first_question_before_a_score_would_be(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("topkd.clients.dialects.base._FACTS_S", 0.1)
    config = ClientConfig(max_retries=1, backoff_s=0.0)
    async with FaultyServer() as server:
        server.frozen = True
        async with VllmCompletions(server.url, config=config) as client, asyncio.timeout(config.read_timeout_s):
            with pytest.raises(ServerTimeoutError, match=r"within 0\.1 s; .*stuck.*2 tries"):
                await client.server_info()


def test_a_password_in_the_url_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="api_key") as caught:
        normalize_url("http://user:hunter2@h:8000")
    assert "hunter2" not in str(caught.value)


async def test_the_key_goes_as_a_bearer_token_and_nowhere_else():
    async with FaultyServer() as server, VllmCompletions(server.url, api_key=KEY, model="t") as client:
        await client.score(IDS, 3, 4)
        assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
        assert KEY not in repr(client) + repr(client.endpoint) + str(client.metrics) + str(vars(client.endpoint))


async def test_a_redirect_to_another_host_drops_the_key_and_one_on_the_same_host_keeps_it():
    async with FaultyServer() as target, FaultyServer() as door:
        door.redirect_to = target.url  # another port is another origin
        async with VllmCompletions(door.url, api_key=KEY, model="t") as client:
            await client.score(IDS, 3, 4)
        assert target.scored == 1
        assert "authorization" not in target.headers[-1]
        assert door.headers[-1]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("location", ["http://[bad", "", "ftp://x/", "mailto:x@y", "//"])
async def test_a_redirect_to_nowhere_is_a_typed_error(location: str):
    async with FaultyServer() as server, VllmCompletions(server.url, model="t", config=QUICK) as client:
        server.redirect_to = location or "#"
        with pytest.raises((ResponseError, RequestRefusedError, ServerUnreachableError, ConfigError)):
            await client.score(IDS, 3, 4)


async def test_redirects_in_a_circle_end():
    async with FaultyServer() as server, VllmCompletions(server.url, model="t", config=QUICK) as client:
        server.redirect_to = server.url
        with pytest.raises(RequestRefusedError, match="too many redirects"):
            await client.score(IDS, 3, 4)


async def test_a_reply_may_not_be_larger_than_was_asked_for():
    async with FaultyServer() as server:
        config = QUICK.model_copy(update={"max_reply_bytes": 1024})
        async with VllmCompletions(server.url, model="t", config=config) as client:
            with pytest.raises(ResponseError, match=r"too large.*max_reply_bytes"):
                await client.score(IDS, 3, 4)


@in_virtual_time
async def test_a_try_ends_at_its_time_out_and_says_which_knob_to_turn():
    async with FaultyServer() as server:
        server.delay_s = 30.0
        config = QUICK.model_copy(update={"read_timeout_s": 0.1, "read_timeout_per_token_s": 0.0})
        async with VllmCompletions(server.url, model="t", config=config) as client:
            with pytest.raises(ServerTimeoutError, match=r"within 0.1 s.*read_timeout") as caught:
                await client.score(IDS, 3, 4)
        assert isinstance(caught.value, TimeoutError)


def test_time_outs_grow_with_tokens():
    config = ClientConfig(read_timeout_s=10, read_timeout_per_token_s=0.5)
    assert config.try_timeout_s(0) == 10
    assert config.try_timeout_s(100) == 60


@in_virtual_time
async def test_the_total_time_bounds_all_tries_together():
    async with FaultyServer(lambda n, r: "stall") as server:
        config = ClientConfig(
            read_timeout_s=0.3, read_timeout_per_token_s=0, total_timeout_s=0.8, max_retries=50, backoff_s=0.001
        )
        async with VllmCompletions(server.url, model="t", config=config) as client:
            with pytest.raises(ServerTimeoutError):
                await client.score(IDS, 3, 4)
        assert 2 <= server.scored <= 4, "0.8 s hold two whole tries and a shortened one"


def test_one_client_serves_one_event_loop_after_another():
    async def once(server: FaultyServer, client: VllmCompletions) -> float:
        async with server, client:
            return float((await client.score(IDS, 3, 4)).actual_logp[0])

    server = FaultyServer()
    asyncio.run(_bind(server))
    client = VllmCompletions(server.url, model="t", config=QUICK)
    assert asyncio.run(once(server, client)) == asyncio.run(once(server, client))


async def _bind(server: FaultyServer) -> None:
    async with server:
        pass


async def test_a_closed_client_says_so():
    async with FaultyServer() as server:
        client = VllmCompletions(server.url, model="t")
        await client.score(IDS, 3, 4)
        await client.aclose()
        with pytest.raises(ConfigError, match="closed"):
            await client.score(IDS, 3, 4)


async def test_an_untrusted_certificate_is_final(monkeypatch: pytest.MonkeyPatch):
    error = httpx.ConnectError("x")
    error.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")

    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(httpx.AsyncClient, "stream", refuse)
    transport = HttpTransport(QUICK)
    with pytest.raises(FinalServerError, match="certificate"):
        await transport.send(Request("GET", "https://h/"))
    await transport.aclose()


def test_vocabulary_of_the_fake_is_what_the_tests_assume():
    assert max(IDS) < VOCAB
