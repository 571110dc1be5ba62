"""Requests through httpx: TLS, proxies of the environment, unusual addresses. The only module that knows httpx."""

from __future__ import annotations

import asyncio
import ssl
import weakref

import httpx

from topkd.clients.config import ClientConfig
from topkd.clients.http.http11 import broken_connection, late_connection, no_connection
from topkd.clients.http.messages import SLOW, Reply, ReplyBody, Request
from topkd.topk.errors import ConfigError, FinalServerError, ResponseError, ServerTimeoutError

_Kind = tuple[bool, bool]  # with proxies of the environment, over TLS


class HttpxConnections:
    """One single-connection client per request in flight, reused afterwards.

    A pool of n connections looks at all of them (and polls their sockets) for every request; n pools of one do not. The
    gate before this bounds how many there are. Clients belong to the event loop that they were made in.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._idle: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Kind, list[httpx.AsyncClient]]] = (
            weakref.WeakKeyDictionary()
        )
        self._tls: ssl.SSLContext | None = None

    async def send(self, request: Request, *, trust_env: bool) -> Reply:
        """Send a request, and return whatever the server replies; every exception of httpx leaves as one of ours."""
        where = f"{request.method} {request.url}"
        try:
            return await self._send(request, trust_env)
        except httpx.ConnectTimeout as error:
            raise late_connection(where, self._config.connect_timeout_s) from error
        except httpx.TimeoutException as error:
            raise ServerTimeoutError("no reply in time", where=where, hint=SLOW) from error
        except httpx.UnsupportedProtocol as error:  # our own addresses are http(s): it is the target of a redirect
            raise ResponseError("the server redirects to an address that cannot be used", where=where) from error
        except (httpx.InvalidURL, httpx.LocalProtocolError) as error:
            raise ConfigError(
                "the address, or the one it redirects to, cannot be used", where=where, expected="http(s)://host:port"
            ) from error
        except (httpx.ConnectError, ssl.SSLError) as error:
            raise _connect_error(error, where) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.CookieConflict) as error:
            raise broken_connection(request, type(error).__name__) from error

    async def aclose(self) -> None:
        """Close the connections of this loop."""
        for clients in self._idle.pop(asyncio.get_running_loop(), {}).values():
            for client in clients:
                await client.aclose()

    def _client(self, kind: _Kind) -> httpx.AsyncClient:
        trust_env, tls = kind
        if tls and self._tls is None and self._config.verify_tls:
            self._tls = httpx.create_ssl_context()  # 100 ms: once, and not for plain HTTP
        return httpx.AsyncClient(
            verify=self._tls or False,
            trust_env=trust_env,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=self._config.connect_timeout_s),
            limits=httpx.Limits(max_connections=1, keepalive_expiry=self._config.keepalive_expiry_s),
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "topkd"},
        )

    async def _send(self, request: Request, trust_env: bool) -> Reply:  # noqa: FBT001 - private
        loop = asyncio.get_running_loop()
        kept = self._idle.setdefault(loop, {})
        kind = (trust_env, request.url.startswith("https:"))
        idle = kept.setdefault(kind, [])
        # The one used last: its connection is the least likely to have been closed meanwhile.
        client = idle.pop() if idle else self._client(kind)
        headers = {**request.headers, **request.private}
        try:
            async with client.stream(request.method, request.url, content=request.content, headers=headers) as response:
                body = await _read(response, request)
                return Reply(response.status_code, dict(response.headers), body, request.url)
        finally:
            if self._idle.get(loop) is not kept:  # closed meanwhile
                await client.aclose()
            else:
                idle.append(client)


async def _read(response: httpx.Response, request: Request) -> bytes:
    body = ReplyBody(request, response.headers)
    clock = asyncio.get_running_loop().time
    limit = asyncio.timeout(request.stall_s)
    try:
        async with limit:
            async for chunk in response.aiter_raw():
                limit.reschedule(clock() + request.stall_s)
                body.add(chunk)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise body.stalled() from error
    return body.join()


def _connect_error(error: Exception, where: str) -> Exception:
    cause: BaseException | None = error
    hint = None
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
            hint = (
                "does the server want a client's certificate, or another version of TLS?"
                if alert
                else "is this a server without TLS, at http://?"
            )
        cause = cause.__cause__ or cause.__context__
    return no_connection(where, str(error) or type(error).__name__, hint)
