"""HTTP/1.1 in the clear: what is a whole reply, what is refused, and when a connection may carry another request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from tests.fakes.virtual_time import in_virtual_time
from tests.faults.server import KEY, until
from topkd.clients import ClientConfig
from topkd.clients.http.http11 import Address, ReplyReader, build_head, read_plain_address
from topkd.clients.http.transport import HttpTransport, Reply, Request, _has_proxies
from topkd.topk.errors import (
    ConfigError,
    ResponseError,
    ServerTimeoutError,
    ServerUnreachableError,
)

CONFIG = ClientConfig()
GET = Request("GET", "http://h/")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


def read(data: bytes, request: Request = GET, *, closes: bool = False, step: int = 0) -> tuple[Reply, bool]:
    """What a reader makes of bytes that come ``step`` at a time (0: all at once)."""
    reader = ReplyReader(request)
    step = step or len(data)
    for at in range(0, len(data), step):
        reader.feed(data[at : at + step])
    if closes and not reader.is_done:
        reader.feed(b"")
    assert reader.is_done
    return reader.build_reply(), reader.is_reusable


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = {
    "a length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello", True),
    "no body": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"", True),
    "the same length twice": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nhi", b"hi", True),
    "chunks": (CHUNKED + b"3\r\nhel\r\n00A;x=y\r\nlo, world!\r\n0\r\n\r\n", b"hello, world!", True),
    "chunks with trailers": (CHUNKED + b"2 \r\nhi\r\n0\r\nx-sum: 1\r\nx-b: 2\r\n\r\n", b"hi", True),
    "an empty chunked body": (CHUNKED + b"0\r\n\r\n", b"", True),
    "chunks and a length": (CHUNKED[:-2] + b"content-length: 9\r\n\r\n2\r\nhi\r\n0\r\n\r\n", b"hi", False),
    "interim replies": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + OK, b"{}", True),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nhi", b"hi", True),
    "bare line feeds": (b"HTTP/1.1 200 OK\ncontent-length: 2\n\nhi", b"hi", True),
    "the last one": (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nConnection: x, Close\r\n\r\nhi", b"hi", False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"hi", False),
    "HTTP/1.0 kept alive": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nhi", b"hi", True),
    "204": (b"HTTP/1.1 204 No Content\r\ncontent-length: 7\r\n\r\n", b"", True),
    "304": (b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", b"", True),
}  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("name", list(WHOLE))
def test_a_reply_is_the_same_however_its_bytes_come(name: str, step: int):
    data, body, is_reusable = WHOLE[name]
    reply, can_be_reused = read(data, step=step)
    assert (reply.body, can_be_reused) == (body, is_reusable)


def test_bytes_behind_a_reply_are_not_read_as_the_next():
    reply, is_reusable = read(OK + OK)
    assert (reply.body, is_reusable) == (b"{}", False)


@pytest.mark.parametrize("step", [0, 1])
def test_a_body_without_a_length_ends_with_the_connection(step: int):
    reply, is_reusable = read(b"HTTP/1.1 200 OK\r\n\r\nuntil the end", closes=True, step=step)
    assert (reply.body, is_reusable) == (b"until the end", False)


def test_the_reply_to_head_has_no_body_whatever_it_announces():
    reply, is_reusable = read(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n", Request("HEAD", "http://h/"))
    assert (reply.body, is_reusable) == (b"", True)


def test_headers_are_lower_case_joined_unfolded_and_text():
    head = (
        b"HTTP/1.1 429 X\r\nRetry-After:\t3 \r\nX-A: 1\r\nx-a: 2\r\nx-b: one\r\n  two\r\nx-c: \xc3\xa9\r\nx-d: \xe9\r\n"
    )
    reply, _ = read(head + b"content-length: 0\r\n\r\n")
    assert reply.status == 429
    assert reply.headers == {
        "retry-after": "3", "x-a": "1, 2", "x-b": "one two", "x-c": "é", "x-d": "é", "content-length": "0"
    }  # fmt: skip


INVALID = {
    "another protocol": b"hello, I am a mail server\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a header without a colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "a space before the colon": b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nhi",
    "a NUL in a header": b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n",
    "folding without a header": b"HTTP/1.1 200 OK\r\n x: y\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n",
    "a length with a sign": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nhi",
    "a length that is no number": b"HTTP/1.1 200 OK\r\ncontent-length: \xc2\xb2\r\n\r\nhi",
    "another coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    "a chunk size with a sign": CHUNKED + b"+2\r\nhi\r\n0\r\n\r\n",
    "a chunk size with a prefix": CHUNKED + b"0x2\r\nhi\r\n0\r\n\r\n",
    "an empty chunk size": CHUNKED + b"\r\nhi\r\n0\r\n\r\n",
    "an endless chunk size": CHUNKED + b"0" * 17 + b"\r\n",
    "a chunk longer than announced": CHUNKED + b"2\r\nhip\r\n0\r\n\r\n",
    "a switch of protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n",
    "a header without an end": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000,
    "a chunk line without an end": CHUNKED + b"2;" + b"y" * 200_000,
    "trailers without an end": CHUNKED + b"0\r\n" + b"x: y\r\n" * 50_000,
}


@pytest.mark.parametrize("name", list(INVALID))
def test_what_is_not_http_is_refused_with_the_address_in_one_short_line(name: str):
    with pytest.raises(ServerUnreachableError, match=r"GET http://h/") as caught:
        read(INVALID[name], closes=True)
    assert "broke before" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "0 bytes of headers"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "27 bytes of headers"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", "5 of 9 bytes"),
        (CHUNKED + b"9\r\nhello", "5 of 9 bytes"),
        (CHUNKED + b"5\r\nhello\r\n", "without its end"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", "without its end"),
    ],
)
def test_a_reply_that_is_cut_off_is_never_taken_for_a_whole_one(data: bytes, got: str):
    reader = ReplyReader(GET)
    if data:
        reader.feed(data)
    with pytest.raises(ServerUnreachableError, match=f"broke before the reply was whole.*{got}"):
        reader.feed(b"")


def test_bounds_and_compression_hold_for_chunks_too():
    small = Request("GET", "http://h/", max_bytes=10)
    with pytest.raises(ResponseError, match=r"too large.*11 bytes announced.*at most 10"):
        read(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n", small)
    with pytest.raises(ResponseError, match=r"too large.*more than 10"):
        read(CHUNKED + b"6\r\nsix...\r\n6\r\nsix...\r\n0\r\n\r\n", small)
    packed = zlib.compress(b"hello" * 2)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: deflate\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(packed)
    assert read(head + packed + b"\r\n0\r\n\r\n", small, step=3)[0].body == b"hellohello"
    packed = zlib.compress(b"hello" * 2000)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    with pytest.raises(ResponseError, match=r"too large.*more than 1000"):
        read(head + packed, Request("GET", "http://h/", max_bytes=1000))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", Address("h", 80, "h", "/")),
        ("http://H.Lab:8000/v1/x?a=b%20c", Address("h.lab", 8000, "h.lab:8000", "/v1/x?a=b%20c")),
        ("http://[::1]:8000/", Address("::1", 8000, "[::1]:8000", "/")),
        ("http://10.0.0.1:80/x", Address("10.0.0.1", 80, "10.0.0.1", "/x")),
    ],
)
def test_a_plain_address_is_asked_as_it_stands(url: str, address: Address):
    assert read_plain_address(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "https://h/", "http://h:99999/", "http://h:0/", "http://ü.de/", "http://h/a b", "http://h/%zz", "http://h/a/../b",
        "http://h/#x", "http://user@h/", "http://h/\r\nx: y", "http://h\n/", "http://", "http://-h/", "http://[fe80::1%25eth0]/",
    ],
)  # fmt: skip
def test_any_other_address_is_left_to_httpx(url: str):
    assert read_plain_address(url) is None


def test_the_head_says_what_is_sent_and_to_whom():
    request = Request(
        "POST", "http://h:81/x", b"{}", {"content-type": "application/json"}, {"authorization": "Bearer k"}
    )
    address = read_plain_address(request.url)
    assert address is not None
    first, *lines = build_head(request, address).decode().split("\r\n")
    assert first == "POST /x HTTP/1.1"
    assert lines[-2:] == ["", ""]
    assert dict(line.split(": ", 1) for line in lines[:-2]) == {
        "host": "h:81", "accept": "application/json", "accept-encoding": "identity", "connection": "keep-alive",
        "user-agent": "topkd", "content-length": "2", "content-type": "application/json", "authorization": "Bearer k",
    }  # fmt: skip


@pytest.mark.parametrize("headers", [{"x": f"{KEY}\r\ny: z"}, {"x": f"{KEY}é"}, {"x y": KEY}, {"x:": KEY}, {"": KEY}])
def test_a_header_that_would_become_two_is_refused_without_its_value(headers: dict[str, str]):
    with pytest.raises(ConfigError, match="cannot carry") as caught:
        build_head(Request("GET", "http://h/", private=headers), Address("h", 80, "h", "/"))
    assert KEY not in str(caught.value)


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Loopback:
    """A server that does with each connection what the test says."""

    talk: Talk
    url: str = ""
    opened: int = 0
    open: int = 0
    heads: list[bytes] = field(default_factory=list)

    async def request(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length or 0))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.open += 1
        try:
            await self.talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.transport.abort()


@contextlib.asynccontextmanager
async def loopback(talk: Callable[[Loopback, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]):
    async def with_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(server, reader, writer)

    server = Loopback(with_server)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/x"
    try:
        yield server
    finally:
        listening.close()
        await until(lambda: not server.open)


@contextlib.asynccontextmanager
async def transport(**options: float) -> AsyncIterator[HttpTransport]:
    made = HttpTransport(ClientConfig(**options))
    try:
        yield made
    finally:
        await made.aclose()


async def always_ok(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await server.request(reader)
        writer.write(OK)


async def test_one_connection_carries_one_request_after_another_and_each_of_several_at_once_has_its_own():
    async with loopback(always_ok) as server, transport() as client:
        for _ in range(3):
            assert (await client.send(Request("POST", server.url, b"{}"))).body == b"{}"
        assert server.opened == 1
        await asyncio.gather(*(client.send(Request("GET", server.url)) for _ in range(5)))
        assert server.opened == 5
        await client.send(Request("GET", server.url))
        assert server.opened == 5
        await client.aclose()
        await until(lambda: server.open == 0)
        with pytest.raises(ConfigError, match="closed"):
            await client.send(Request("GET", server.url))


async def test_a_connection_that_the_server_closed_while_idle_is_not_used_again():
    async def once(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)

    async with loopback(once) as server, transport() as client:
        for _ in range(3):
            assert (await client.send(Request("GET", server.url))).status == 200
            await until(lambda: not server.open)
        assert server.opened == 3


async def test_a_close_that_the_loop_has_not_noticed_yet_costs_no_request():
    """The close is in the socket, but no turn of the loop has read it when the next request goes out."""

    async def once(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)
        await writer.drain()
        writer.transport.abort()

    async with loopback(once) as server, transport() as client:
        await client.send(Request("GET", server.url))
        [[connection]] = client._direct._idle[asyncio.get_running_loop()].values()
        connection._transport.pause_reading()  # as a loop that is busy elsewhere
        await until(lambda: not server.open)
        assert (await client.send(Request("GET", server.url))).status == 200
        assert server.opened == 2


@in_virtual_time
async def test_a_connection_that_idled_too_long_is_replaced():
    async with loopback(always_ok) as server, transport(keepalive_expiry_s=4.0) as client:
        await client.send(Request("GET", server.url))
        await asyncio.sleep(3.0)
        await client.send(Request("GET", server.url))
        assert server.opened == 1
        await asyncio.sleep(5.0)
        await client.send(Request("GET", server.url))
        assert server.opened == 2


async def test_bytes_that_nobody_asked_for_are_no_reply_to_the_next_request():
    async def talkative(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await server.request(reader)
            writer.write(OK + b"HTTP/1.1 500 Forged\r\ncontent-length: 0\r\n\r\n")

    async with loopback(talkative) as server, transport() as client:
        for _ in range(3):
            assert (await client.send(Request("GET", server.url))).status == 200
        assert server.opened == 3


async def test_a_reply_that_comes_before_the_request_is_out_is_read_and_the_connection_dropped():
    async def hasty(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        server.heads.append(head)
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        await reader.read()  # until the client hangs up

    async with loopback(hasty) as server, transport() as client:
        reply = await client.send(Request("POST", server.url, b"x" * 64_000_000))
        assert (reply.status, reply.body) == (413, b"big")
        await until(lambda: not server.open)


async def test_a_large_request_arrives_whole():
    async def echo(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    sent = bytes(range(256)) * 4000
    async with loopback(echo) as server, transport() as client:
        assert (await client.send(Request("POST", server.url, sent))).body == sent


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\ncontent-len", OK[:-1], CHUNKED + b"5\r\nhe"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_half_a_reply_is_an_error_whether_closed_or_reset(part: bytes, how: str):
    async def break_off(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")  # and leaves the body unread: a close then is a reset
        writer.write(part)
        await writer.drain()
        if how == "reset":
            writer.transport.abort()

    content = b"x" * 100_000 if how == "reset" else None
    async with loopback(break_off) as server, transport() as client:
        with pytest.raises(ServerUnreachableError, match=r"broke before the reply was whole \((GET|POST) http://127"):
            await client.send(Request("POST" if content else "GET", server.url, content))
        assert not any(client._direct._idle[asyncio.get_running_loop()].values())


async def test_a_body_until_the_close_that_is_reset_instead_is_not_taken_for_whole():
    async def reset(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n{}")
        await writer.drain()
        await gone.wait()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    gone = asyncio.Event()
    async with loopback(reset) as server, transport() as client:
        sending = asyncio.create_task(client.send(Request("GET", server.url, on_bytes=gone.set)))
        with pytest.raises(ServerUnreachableError, match="ConnectionResetError"):
            await sending


async def test_a_cancelled_request_hangs_up_and_leaves_nothing_for_the_next():
    async def slow(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        if server.opened == 1:
            await reader.read()  # until the client hangs up
        writer.write(OK)

    async with loopback(slow) as server, transport() as client:
        first = asyncio.create_task(client.send(Request("GET", server.url)))
        await until(lambda: server.heads)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await until(lambda: not server.open)
        assert (await client.send(Request("GET", server.url))).status == 200


@in_virtual_time
async def test_a_reply_may_pause_for_less_than_the_stall_but_not_for_more():
    async def drip(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
        for byte in (b"a", b"b", b"c"):
            await asyncio.sleep(8.0)
            writer.write(byte)
        await asyncio.sleep(pause_s)
        writer.write(b"d")

    pause_s = 8.0
    async with loopback(drip) as server, transport() as client:
        request = Request("GET", server.url, stall_s=10.0, timeout_s=1000.0)
        assert (await client.send(request)).body == b"abcd"
        pause_s = 15.0
        with pytest.raises(ServerTimeoutError, match=r"stopped in the middle.*3 bytes, then nothing for 10 s"):
            await client.send(request)


async def test_a_client_that_is_closed_while_a_reply_comes_lets_it_come_and_then_hangs_up():
    async def wait(server: Loopback, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        await closed.wait()
        writer.write(OK)
        await reader.read()

    closed = asyncio.Event()
    async with loopback(wait) as server, transport() as client:
        sending = asyncio.create_task(client.send(Request("GET", server.url)))
        await until(lambda: server.heads)
        await client.aclose()
        closed.set()
        assert (await sending).body == b"{}"
        await until(lambda: not server.open)


async def test_no_server_is_no_connection_and_a_name_nobody_has_neither():
    async with transport() as client:
        with pytest.raises(
            ServerUnreachableError, match=r"no connection \(GET http://127.0.0.1:1/x\).*is the server running"
        ):
            await client.send(Request("GET", "http://127.0.0.1:1/x"))
        with pytest.raises(ConfigError, match="name cannot be looked up"):
            await client.send(Request("GET", f"http://{'a' * 70}.localhost:1/x"))


@in_virtual_time
async def test_a_connection_that_is_not_made_in_time_says_so(monkeypatch: pytest.MonkeyPatch):
    async def hang(*args: object, **options: object) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", hang)
    async with transport(connect_timeout_s=5.0) as client:
        with pytest.raises(ServerTimeoutError, match=r"no connection in time.*within 5 s"):
            await client.send(Request("GET", "http://10.255.255.1:1/x"))
        with pytest.raises(ServerTimeoutError, match=r"not complete in time.*within 2 s"):
            await client.send(Request("GET", "http://10.255.255.1:1/x", timeout_s=2.0))


async def test_a_proxy_of_the_environment_is_used_for_the_world_outside_only(monkeypatch: pytest.MonkeyPatch):
    async with loopback(always_ok) as proxy, loopback(always_ok) as server, transport() as client:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/x"))
        assert (await client.send(Request("GET", "http://teacher.invalid:8000/v1/models"))).status == 200
        assert proxy.heads[0].startswith(b"GET http://teacher.invalid:8000/v1/models HTTP/1.1\r\n")
        await client.send(Request("GET", server.url))
        assert server.heads[0].startswith(b"GET /x HTTP/1.1\r\n")
        assert len(proxy.heads) == 1


async def test_a_list_of_hosts_without_a_proxy_is_no_proxy(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "localhost,.cluster")
    assert not _has_proxies()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert _has_proxies()
