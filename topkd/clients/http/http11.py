"""HTTP/1.1 in the clear, straight on asyncio: what a request to a model server needs, and no general client.

``ReplyReader`` is the protocol and knows no socket; ``DirectConnections`` owns the sockets. Whatever is not plain
(TLS, proxies, unusual addresses) goes through httpx: see ``clients.http.transport``.
"""

from __future__ import annotations

import asyncio
import re
import select
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from topkd.clients.config import ClientConfig
from topkd.clients.http.messages import Reply, ReplyBody, Request
from topkd.topk.errors import ConfigError, ServerTimeoutError, ServerUnreachableError, TopkdError

_MAX_HEAD = 100 * 1024  # bytes of a status line and its headers, and of one line within a chunked body
_ONE_WRITE = 65_536  # a body up to this size is copied behind its head: one packet train, one system call
_URL = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]*)(?::(\d{1,5}))?(/[^?#]*)?(\?[^#]*)?")
_TARGET = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\x00\r\n]*)?")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00\r\n]*)?")
_NAME, _VALUE = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"), re.compile(r"[\t\x20-\x7e]*")
_BODILESS = {204, 304}
_NEXT_ADDRESS_S = 0.25  # until the next address of a host is tried beside the first (RFC 8305)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a plain URL leads: host and port to connect to, and what the request says of them."""

    host: str
    port: int
    authority: str
    target: str


@lru_cache(maxsize=256)
def read_plain_address(url: str) -> Address | None:
    """Read a URL that can be asked for as it stands; None for any that has to be normalized first, or is not http."""
    match = _URL.fullmatch(url)
    if match is None:
        return None
    host, digits, path, query = match.groups()
    port, target = int(digits or 80), (path or "/") + (query or "")
    if not 0 < port < 65_536 or not _TARGET.fullmatch(target) or "/." in target:
        return None
    return Address(host.strip("[]").lower(), port, host.lower() + (f":{port}" if port != 80 else ""), target)


def build_head(request: Request, address: Address) -> bytes:
    """Build the request line and the headers.

    Raises:
        ConfigError: a header that HTTP cannot carry; its value is not shown, since it may be a key.
    """
    lines = [
        f"{request.method} {address.target} HTTP/1.1",
        f"host: {address.authority}",
        "accept: application/json",
        "accept-encoding: identity",
        "connection: keep-alive",
        "user-agent: topkd",
    ]
    if request.content is not None or request.method in {"POST", "PUT", "PATCH"}:
        lines.append(f"content-length: {len(request.content or b'')}")
    for headers in (request.headers, request.private):
        for name, value in headers.items():
            if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
                raise ConfigError(
                    "a request header holds characters that HTTP cannot carry",
                    where=f"{request.method} {request.url}",
                    got=f"header {name!r}",
                    expected="printable ASCII",
                )
            lines.append(f"{name}: {value}")
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"


class ReplyReader:
    """Reads one reply from bytes as they come: head, body, and whether the connection can be used again.

    Attributes:
        status: 0 until the head has come.
        headers: Lower-case names; a header that was sent twice has both values, joined by a comma.
        body: None until the head has come.
        is_done: The reply is whole.
        is_reusable: Nothing was odd about it: the connection may carry another request.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._ended = request, False
        self.status, self.headers = 0, dict[str, str]()
        self.body: ReplyBody | None = None
        self.is_done, self.is_reusable = False, False
        self._steps = self._read()
        next(self._steps)

    def build_reply(self) -> Reply:
        """Build the reply; it must be whole."""
        return Reply(self.status, self.headers, self.body.join() if self.body else b"", self._request.url)

    def feed(self, data: bytes) -> None:
        """Take bytes; none at all means that the server closed.

        Raises:
            ServerUnreachableError: the server closed too early, or does not speak HTTP/1.1.
            ResponseError: the body breaks a bound.
        """
        self._ended = not data
        try:
            self._steps.send(data)
        except StopIteration:
            self.is_done = True

    def _read(self) -> Generator[None, bytes, None]:
        keep, rest = yield from self._read_final_head()
        self.body = ReplyBody(self._request, self.headers)
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if self._request.method == "HEAD" or self.status in _BODILESS:
            pass
        elif coding is not None:
            if coding.strip().lower() != "chunked":
                raise self._invalid("a transfer encoding that was not asked for", coding)
            rest = yield from self._read_chunks(self.body, rest)
            keep = keep and length is None  # both at once: a proxy may disagree with us about where it ends
        elif length is not None:
            rest = yield from self._read_length(self.body, rest, self._read_number(length))
        else:
            keep = False
            while not self._ended:
                if rest:
                    self.body.add(rest)
                rest = yield
        self.is_reusable = keep and not rest

    def _read_final_head(self) -> Generator[None, bytes, tuple[bool, bytes]]:
        """Read the head behind any interim ones (100 Continue); return "can be kept alive" and what came after it."""
        rest = b""
        while True:
            searched = 0
            while (end := _HEAD_END.search(rest, searched)) is None:
                if len(rest) > _MAX_HEAD:
                    raise self._invalid("the headers do not end", f"{len(rest)} bytes of them")
                searched = max(0, len(rest) - 3)
                rest += yield
                if self._ended:
                    raise self._closed(f"{len(rest)} bytes of headers")
            first, *lines = rest[: end.start()].split(b"\n")
            rest = rest[end.end() :]
            status = _STATUS.fullmatch(first.rstrip(b"\r"))
            if status is None:
                raise self._invalid("the reply is not HTTP/1.1", first[:80])
            if b"100" <= status[2] < b"200" and status[2] != b"101":
                continue
            if status[2] == b"101":
                raise self._invalid("the server switches to another protocol", status[0])
            self.status, self.headers = int(status[2]), self._read_headers(lines)
            wishes = {wish.strip().lower() for wish in self.headers.get("connection", "").split(",")}
            return (status[1] == b"1" or "keep-alive" in wishes) and "close" not in wishes, rest

    def _read_headers(self, lines: list[bytes]) -> dict[str, str]:
        headers = dict[str, str]()
        name = ""
        for line in lines:
            if line[:1] in {b" ", b"\t"} and name:  # folded, as HTTP once allowed
                headers[name] += " " + _decode(line.strip())
                continue
            field = _FIELD.fullmatch(line.rstrip(b"\r"))
            if field is None:
                raise self._invalid("a header cannot be read", line[:80])
            name, value = field[1].decode("ascii").lower(), _decode(field[2])
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return headers

    def _read_number(self, text: str) -> int:
        values = {value.strip() for value in text.split(",")}
        value = values.pop()
        if values or not (value.isascii() and value.isdigit()) or len(value) > 18:
            raise self._invalid("the content-length is no number", text[:80])
        return int(value)

    def _read_length(self, body: ReplyBody, rest: bytes, length: int) -> Generator[None, bytes, bytes]:
        """Read ``length`` bytes; return those that came after."""
        left = length
        while left:
            if not rest:
                rest = yield
                if self._ended:
                    raise self._closed(f"{length - left} of {length} bytes")
            if len(rest) <= left:
                body.add(rest)
                left, rest = left - len(rest), b""
            else:
                body.add(rest[:left])
                left, rest = 0, rest[left:]
        return rest

    def _read_chunks(self, body: ReplyBody, rest: bytes) -> Generator[None, bytes, bytes]:
        """Read a chunked body and its trailers; return the bytes that came after."""
        while True:
            line, rest = yield from self._read_line(rest)
            size = _CHUNK.fullmatch(line)
            if size is None:
                raise self._invalid("the size of a chunk cannot be read", line[:80])
            length = int(size[1], 16)
            if not length:
                break
            rest = yield from self._read_length(body, rest, length)
            line, rest = yield from self._read_line(rest)
            if line:
                raise self._invalid("a chunk is longer than was announced", line[:80])
        trailers = 0
        while line:
            line, rest = yield from self._read_line(rest)
            trailers += len(line)
            if trailers > _MAX_HEAD:
                raise self._invalid("the trailers do not end", f"{trailers} bytes of them")
        return rest

    def _read_line(self, rest: bytes) -> Generator[None, bytes, tuple[bytes, bytes]]:
        while (end := rest.find(b"\n")) < 0:
            if len(rest) > _MAX_HEAD:
                raise self._invalid("a line between the chunks does not end", f"{len(rest)} bytes of it")
            rest += yield
            if self._ended:
                raise self._closed("a chunked reply without its end")
        return rest[:end].removesuffix(b"\r"), rest[end + 1 :]

    def _closed(self, got: str) -> ServerUnreachableError:
        return broken_connection(self._request, got)

    def _invalid(self, what: str, got: object) -> ServerUnreachableError:
        where = f"{self._request.method} {self._request.url}"
        return ServerUnreachableError(what, where=where, got=got, hint="is this the address of an HTTP server?")


def broken_connection(request: Request, got: str) -> ServerUnreachableError:
    """Build the error for a connection that ended too early."""
    where = f"{request.method} {request.url}"
    return ServerUnreachableError("the connection broke before the reply was whole", where=where, got=got)


class _Connection(asyncio.Protocol):
    """One connection; it carries one exchange at a time, and is closed by whatever is unusual."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._request: Request | None = None
        self._reader: ReplyReader | None = None
        self._over: asyncio.Future[None] | None = None
        self._failure: TopkdError | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._heard_at = self._idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._over is None or self._over.done():  # nobody asked
            self.close()
            return
        reader = cast("ReplyReader", self._reader)
        self._feed(reader, data)
        if reader.body is not None and not self._over.done():  # in the middle of the reply
            self._heard_at = self._loop.time()
            if self._stall is None:
                self._look_in(self._request.stall_s if self._request else 0.0)

    def eof_received(self) -> None:
        if self._reader is not None:
            self._feed(self._reader, b"")

    def connection_lost(self, error: Exception | None) -> None:
        if self._request is not None:
            self._finish(broken_connection(self._request, type(error).__name__ if error else "closed"))

    def is_usable(self, expiry_s: float) -> bool:
        """Check that an idle connection is young and still open, which the loop may not have noticed yet."""
        if not self.is_open or self._loop.time() - self._idle_since > expiry_s:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)  # readable while idle: it was closed, or the server speaks out of turn

    @property
    def is_open(self) -> bool:
        """Check that neither side has closed it, as far as the loop has seen."""
        return not self._transport.is_closing()

    def close(self) -> None:
        """Close at once; bytes under way are dropped."""
        self._transport.abort()

    async def exchange(self, request: Request, head: bytes) -> Reply:
        """Send a request and wait for its whole reply; a failure, and a cancellation too, closes the connection."""
        if not self.is_open:
            raise broken_connection(request, "closed before the request was sent")
        reader, content = ReplyReader(request), request.content or b""
        self._request, self._reader, self._failure = request, reader, None
        self._over = self._loop.create_future()
        try:
            if len(content) <= _ONE_WRITE:
                self._transport.write(head + content)
            else:
                self._transport.write(head)
                self._transport.write(content)
            await self._over
            reply = self._take_reply(reader)
        except BaseException:
            self.close()
            raise
        finally:
            if self._stall is not None:
                self._stall.cancel()
            self._request = self._reader = self._over = self._failure = self._stall = None
        # A reply that came before its request was out leaves the rest of the request in the way of the next.
        if not reader.is_reusable or self._transport.get_write_buffer_size():
            self.close()
        self._idle_since = self._loop.time()
        return reply

    def _take_reply(self, reader: ReplyReader) -> Reply:
        if self._failure is not None:
            raise self._failure
        return reader.build_reply()

    def _feed(self, reader: ReplyReader, data: bytes) -> None:
        try:
            reader.feed(data)
        except TopkdError as error:
            self._finish(error)
        else:
            if reader.is_done:
                self._finish(None)

    def _finish(self, failure: TopkdError | None) -> None:
        if self._over is not None and not self._over.done():
            self._failure = failure  # not in the future: a cancelled exchange would leave it there unread
            self._over.set_result(None)

    def _look_in(self, seconds: float) -> None:
        self._stall = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """End the exchange when the reply has stalled; else look again when it could have."""
        if self._request is None or self._reader is None or self._reader.body is None:
            return
        left = self._heard_at + self._request.stall_s - self._loop.time()
        if left > 0:
            self._look_in(left)
        else:
            self._finish(self._reader.body.stalled())


class DirectConnections:
    """Connections in the clear, kept by event loop and address: one for each request in flight, reused afterwards."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._idle: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], list[_Connection]]] = (
            weakref.WeakKeyDictionary()
        )

    async def send(self, request: Request, address: Address) -> Reply:
        """Send a request, and return whatever the server replies.

        Raises:
            ServerUnreachableError, ServerTimeoutError: no connection, or none that lasted.
            ResponseError: the reply breaks a bound.
            ConfigError: a header or the host's name cannot be sent.
        """
        head = build_head(request, address)
        loop = asyncio.get_running_loop()
        kept = self._idle.setdefault(loop, {})
        idle = kept.setdefault((address.host, address.port), [])
        connection = self._take(idle) or await self._open(request, address)
        reply = await connection.exchange(request, head)
        if self._idle.get(loop) is not kept:  # closed meanwhile
            connection.close()
        elif connection.is_open:
            idle.append(connection)
        return reply

    async def aclose(self) -> None:
        """Close the idle connections of this loop; those in use are closed when their reply has come."""
        for idle in self._idle.pop(asyncio.get_running_loop(), {}).values():
            for connection in idle:
                connection.close()
        await asyncio.sleep(0)  # the loop closes sockets in its next turn

    def _take(self, idle: list[_Connection]) -> _Connection | None:
        """Take the connection used last: it is the least likely to have been closed meanwhile."""
        while idle:
            connection = idle.pop()
            if connection.is_usable(self._config.keepalive_expiry_s):
                return connection
            connection.close()
        return None

    async def _open(self, request: Request, address: Address) -> _Connection:
        where = f"{request.method} {request.url}"
        is_name = not (":" in address.host or address.host.replace(".", "").isdigit())
        limit = asyncio.timeout(self._config.connect_timeout_s)
        try:
            async with limit:
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection,
                    address.host,
                    address.port,
                    happy_eyeballs_delay=_NEXT_ADDRESS_S if is_name else None,
                )
                return connection
        except UnicodeError as error:
            raise ConfigError("the host's name cannot be looked up", where=where, got=str(error)) from error
        except OSError as error:
            if limit.expired():
                raise late_connection(where, self._config.connect_timeout_s) from error
            raise no_connection(where, str(error) or type(error).__name__) from error


def no_connection(where: str, got: str, hint: str | None = None) -> ServerUnreachableError:
    """Build the error for a server that cannot be connected to."""
    hint = hint or "is the server running, and are host and port right?"
    return ServerUnreachableError("no connection", where=where, got=got, hint=hint)


def late_connection(where: str, limit_s: float) -> ServerTimeoutError:
    """Build the error for a server that takes too long to accept a connection."""
    hint = "is the address right and the server up?"
    return ServerTimeoutError("no connection in time", where=where, expected=f"within {limit_s:.3g} s", hint=hint)


def _decode(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
