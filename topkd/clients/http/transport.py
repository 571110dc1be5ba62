"""Bytes over HTTP, and nothing else: the only module that knows httpx.

Replies are bounded in size and time, key-carrying headers stay on their host, and every exception of the HTTP library
leaves as one of ours. Anything with ``send`` and ``aclose`` can take its place.
"""

from __future__ import annotations

import asyncio
import ssl
import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol
from urllib.parse import urljoin, urlsplit

import httpx

from topkd.clients.config import ClientConfig
from topkd.topk.errors import (
    ConfigError,
    FinalServerError,
    RequestRefusedError,
    ResponseError,
    ServerTimeoutError,
    ServerUnreachableError,
    TopkdError,
)

_MAX_REDIRECTS = 3
_Kind = tuple[bool, bool]  # outside this machine, over TLS
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    ``private`` headers (keys) are dropped on the way to another host and never shown. ``on_bytes`` is called when some
    of the reply has come; ``stall_s`` bounds the silence within it.
    """

    method: str
    url: str
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    private: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 60.0
    max_bytes: int = 2**30
    stall_s: float = 30.0
    on_bytes: Callable[[], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """Status, headers (lower-case names) and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str = ""


class Transport(Protocol):
    """What the endpoint needs of an HTTP library."""

    async def send(self, request: Request) -> Reply:
        """Send a request; return the whole reply, or raise a ``TopkdError``."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


class HttpxTransport:
    """Send requests with httpx: one single-connection client per request in flight, reused afterwards.

    A pool of n connections looks at all of them (and polls their sockets) for every request; n pools of one do not. The
    gate before this bounds how many there are. Clients belong to the event loop that they were made in.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._idle: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Kind, list[httpx.AsyncClient]]] = (
            weakref.WeakKeyDictionary()
        )
        self._closed: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._tls: ssl.SSLContext | None = None

    async def send(self, request: Request) -> Reply:
        """Send a request and follow redirects; see ``Transport``."""
        where = f"{request.method} {request.url}"
        if asyncio.get_running_loop() in self._closed:
            raise ConfigError("the client is closed", where=where)
        try:
            async with asyncio.timeout(request.timeout_s):
                return await self._follow(request)
        except TopkdError:  # ours already; most of them are OSErrors too
            raise
        except TimeoutError as error:
            raise ServerTimeoutError(
                "the reply was not complete in time",
                where=where,
                expected=f"within {request.timeout_s:.3g} s",
                hint=_SLOW,
            ) from error
        except httpx.ConnectTimeout as error:
            raise ServerTimeoutError(
                "no connection in time",
                where=where,
                expected=f"within {self._config.connect_timeout_s:.3g} s",
                hint="is the address right and the server up?",
            ) from error
        except httpx.TimeoutException as error:
            raise ServerTimeoutError("no reply in time", where=where, hint=_SLOW) from error
        except httpx.UnsupportedProtocol as error:  # our own addresses are http(s): it is the target of a redirect
            raise ResponseError("the server redirects to an address that cannot be used", where=where) from error
        except (httpx.InvalidURL, httpx.LocalProtocolError) as error:
            raise ConfigError(
                "the address, or the one it redirects to, cannot be used", where=where, expected="http(s)://host:port"
            ) from error
        except (httpx.ConnectError, ssl.SSLError) as error:
            raise _connect_error(error, where) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.CookieConflict, OSError) as error:
            raise ServerUnreachableError(
                "the connection broke before the reply was whole", where=where, got=type(error).__name__
            ) from error

    async def aclose(self) -> None:
        """Close the connections of this loop; a loop closes what it opened."""
        loop = asyncio.get_running_loop()
        self._closed.add(loop)
        for clients in self._idle.pop(loop, {}).values():
            for client in clients:
                await client.aclose()

    def _client(self, kind: _Kind) -> httpx.AsyncClient:
        outside, tls = kind
        if tls and self._tls is None and self._config.verify_tls:
            self._tls = httpx.create_ssl_context()  # 100 ms: once, and not for plain HTTP
        return httpx.AsyncClient(
            verify=self._tls or False,
            trust_env=outside,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=self._config.connect_timeout_s),
            limits=httpx.Limits(max_connections=1, keepalive_expiry=self._config.keepalive_expiry_s),
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "topkd"},
        )

    async def _follow(self, request: Request) -> Reply:
        for _ in range(_MAX_REDIRECTS + 1):
            reply = await self._once(request)
            target = reply.headers.get("location")
            if reply.status not in {301, 302, 303, 307, 308} or not target:
                return reply
            url = _target(request.url, target)
            if request.method != "GET" and reply.status not in {307, 308}:
                raise RequestRefusedError(
                    "the server redirects the request in a way that drops its body",
                    where=f"{request.method} {request.url}",
                    got=f"{reply.status} to {url}",
                    hint="use that address as the base URL",
                )
            request = replace(request, url=url, private=request.private if _same_host(request.url, url) else {})
        raise RequestRefusedError("too many redirects", where=f"{request.method} {request.url}")

    async def _once(self, request: Request) -> Reply:
        parts = urlsplit(request.url)
        # Proxies from the environment are for the world outside; a loopback server is never behind one.
        kind = (parts.hostname not in _LOOPBACK, parts.scheme == "https")
        loop = asyncio.get_running_loop()
        idle = self._idle.setdefault(loop, {}).setdefault(kind, [])
        # The one used last: its connection is the least likely to have been closed meanwhile.
        client = idle.pop() if idle else self._client(kind)
        headers = {**request.headers, **request.private}
        try:
            async with client.stream(request.method, request.url, content=request.content, headers=headers) as response:
                body = await _read(response, request)
                return Reply(response.status_code, dict(response.headers), body, request.url)
        finally:
            if loop in self._closed:
                await client.aclose()
            else:
                idle.append(client)


_SLOW = "is the server stuck? raise read_timeout_s or read_timeout_per_token_s if it is only slow"


def _connect_error(error: Exception, where: str) -> Exception:
    cause: BaseException | None = error
    hint = _DEAD
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FinalServerError(
                "the server's TLS certificate is not trusted",
                where=where,
                got=getattr(cause, "verify_message", str(cause)),
                hint="is it the right server? its own CA: SSL_CERT_FILE=<PEM file of the CA>",
            )
        if isinstance(cause, ssl.SSLError):  # its words for a reply in the clear differ between OpenSSL's versions
            alert = "alert" in str(cause).lower()  # only a server that speaks TLS sends one
            hint = _REFUSED if alert else "is this a server without TLS, at http://?"
        cause = cause.__cause__ or cause.__context__
    return ServerUnreachableError("no connection", where=where, got=str(error) or type(error).__name__, hint=hint)


_REFUSED = "does the server want a client's certificate, or another version of TLS?"
_DEAD = "is the server running, and are host and port right?"


def _target(url: str, location: str) -> str:
    try:
        joined = urljoin(url, location)
        usable = urlsplit(joined).scheme in {"http", "https"} and bool(urlsplit(joined).hostname)
    except ValueError:
        usable, joined = False, ""
    if not usable:
        raise ResponseError(
            "the server redirects to an address that cannot be used", where=url, got=repr(location[:200])
        )
    return joined


def _same_host(a: str, b: str) -> bool:
    old, new = urlsplit(a), urlsplit(b)
    if old.hostname != new.hostname:
        return False
    upgrade = old.scheme == "http" and new.scheme == "https" and (old.port or 80, new.port or 443) == (80, 443)
    return upgrade or (old.scheme, old.port) == (new.scheme, new.port)


async def _read(response: httpx.Response, request: Request) -> bytes:
    """Read the body, never more than ``max_bytes`` of it, inflated within the same bound."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in {"", "identity"}:
        inflate = None
    elif encoding in {"gzip", "deflate"}:
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
    else:
        raise ResponseError("the reply is encoded in a way we did not ask for", where=request.url, got=encoding)
    announced = response.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > request.max_bytes:
        raise _too_large(request, f"{announced} bytes announced")
    chunks, size = [], 0
    clock = asyncio.get_running_loop().time
    on_bytes = request.on_bytes or _ignore_bytes
    on_bytes()
    limit = asyncio.timeout(request.stall_s)
    try:
        async with limit:
            async for chunk in response.aiter_raw():
                limit.reschedule(clock() + request.stall_s)
                on_bytes()
                data = chunk if inflate is None else inflate.decompress(chunk, request.max_bytes + 1 - size)
                chunks.append(data)
                size += len(data)
                if size > request.max_bytes:
                    raise _too_large(request, f"more than {request.max_bytes} bytes")
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ServerTimeoutError(
            "the reply stopped in the middle",
            where=f"{request.method} {request.url}",
            got=f"{size} bytes, then nothing for {request.stall_s:.3g} s",
            hint="raise stall_timeout_s if the way is only slow",
        ) from error
    except zlib.error as error:
        raise ResponseError("the reply's compression is broken", where=request.url, got=str(error)) from error
    if inflate is not None and size and not inflate.eof:
        raise ResponseError("the reply's compression is broken", where=request.url, got="a stream without its end")
    return b"".join(chunks)


def _ignore_bytes() -> None:
    """Do nothing."""


def _too_large(request: Request, got: str) -> ResponseError:
    return ResponseError(
        "the reply is too large",
        where=request.url,
        got=got,
        expected=f"at most {request.max_bytes}",
        hint="max_reply_bytes",
    )
