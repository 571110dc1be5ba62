"""Bytes over HTTP, and nothing else: redirects, time-outs, and which connections carry a request.

Replies are bounded in size and time, key-carrying headers stay on their host, and every exception of the HTTP library
leaves as one of ours. Anything with ``send`` and ``aclose`` can take its place.
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from topkd.clients.config import ClientConfig
from topkd.clients.http.http11 import DirectConnections, broken_connection, read_plain_address
from topkd.clients.http.messages import SLOW, Reply, Request, Transport
from topkd.topk.errors import ConfigError, RequestRefusedError, ResponseError, ServerTimeoutError, TopkdError

if TYPE_CHECKING:
    from topkd.clients.http.httpx_connections import HttpxConnections

__all__ = ["HttpTransport", "Reply", "Request", "Transport"]

_MAX_REDIRECTS = 3
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class HttpTransport:
    """Sends requests: in the clear straight over asyncio, over TLS or through a proxy with httpx.

    httpx is imported by the first request that needs it.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._direct = DirectConnections(config)
        self._through_httpx: HttpxConnections | None = None
        self._closed: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

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
                hint=SLOW,
            ) from error
        except OSError as error:
            raise broken_connection(request, type(error).__name__) from error

    async def aclose(self) -> None:
        """Close the connections of this loop; a loop closes what it opened."""
        self._closed.add(asyncio.get_running_loop())
        await self._direct.aclose()
        if self._through_httpx is not None:
            await self._through_httpx.aclose()

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
        address = read_plain_address(request.url)
        # Proxies from the environment are for the world outside; a loopback server is never behind one.
        is_outside = (address.host if address else urlsplit(request.url).hostname) not in _LOOPBACK
        if address is not None and not (is_outside and _has_proxies()):
            return await self._direct.send(request, address)
        if self._through_httpx is None:
            from topkd.clients.http.httpx_connections import HttpxConnections

            self._through_httpx = HttpxConnections(self._config)
        return await self._through_httpx.send(request, trust_env=is_outside)


def _has_proxies() -> bool:
    """Check for proxies in the environment; which of them are for whom is for httpx to say."""
    names = {name.lower() for name, value in os.environ.items() if value}
    if any(name.endswith("_proxy") for name in names - {"no_proxy"}):
        return True
    if sys.platform in {"darwin", "win32"}:  # the system's settings count too
        from urllib.request import getproxies

        return bool(getproxies())
    return False


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
