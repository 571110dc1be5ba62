"""Single questions to a server, outside any dialect: raw bodies in, plain values out, and which routes are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from topkd.clients.decoding.vllm_typed import typed
from topkd.clients.dialects.base import HttpClient
from topkd.clients.http.endpoint import RequestInfo
from topkd.topk.errors import (
    AuthError,
    FinalServerError,
    RequestRefusedError,
    ResponseError,
    ServerFailedError,
    TopkdError,
)

_ANY = msgspec.json.Decoder(Any)


class Wire:
    """Asks one server. ``requests`` counts what was asked."""

    def __init__(self, client: HttpClient) -> None:
        self.client = client

    @property
    def requests(self) -> int:
        """Count the HTTP exchanges so far, retries included."""
        return int(self.client.metrics_["tries"])

    async def post(
        self, path: str, body: Mapping[str, Any], *, entries: int = 4096, tokens: int = 64, k: int = 0
    ) -> dict[str, Any]:
        """Ask ``POST path`` for a JSON object.

        Raises:
            ServerError: any other status, in the server's words.
            ResponseError: not a JSON object.
        """
        value = await self.client.endpoint.call(
            "POST",
            path,
            dict(body),
            decode=lambda reply: typed(reply, _ANY),
            where=self.client.where(f"POST {path}"),
            asks=RequestInfo(tokens=tokens, entries=entries, k=k),
        )
        if not isinstance(value, dict):
            raise ResponseError("the reply is not a JSON object", where=self.client.where(f"POST {path}"))
        return value

    async def get(self, path: str) -> dict[str, Any] | None:
        """Ask ``GET path`` for a JSON object; None where there is no such thing."""
        value = await self._get(path, lambda reply: typed(reply, _ANY), 0)
        return value if isinstance(value, dict) else None

    async def text(self, path: str) -> str:
        """Ask ``GET path`` for text; "" where there is no such route."""
        return await self._get(path, lambda reply: reply.decode("utf-8", "replace"), 2**14) or ""

    async def _get(self, path: str, decode: Callable[[bytes], Any], entries: int) -> Any:
        try:
            return await self.client.endpoint.call(
                "GET", path, decode=decode, where=self.client.where(f"GET {path}"), asks=RequestInfo(entries=entries)
            )
        except AuthError:
            raise
        except (FinalServerError, ResponseError, ServerFailedError):
            return None

    async def mounted(self, path: str) -> bool:
        """Check that a POST-only route is there: it answers a GET with 405, and a route that is not there with 404.

        Nothing is changed on the server, whatever the route does.
        """
        try:
            await self.client.endpoint.call("GET", path, decode=lambda _: None, where=self.client.where(f"GET {path}"))
        except RequestRefusedError as error:
            return error.got == "HTTP 405"
        except AuthError:
            return True
        except (FinalServerError, ResponseError, ServerFailedError):
            return False
        return True


class ServerFacts:
    """A server whose dialect is not known yet: what its routes state, each asked once."""

    def __init__(self, client: HttpClient) -> None:
        self.client, self.wire = client, Wire(client)
        self._version: str | None = None

    @property
    def host(self) -> str:
        """The host of its URL."""
        return urlsplit(self.client.endpoint.url).hostname or ""

    async def version(self) -> str:
        """Ask ``GET /version``; "" without that route."""
        if self._version is None:
            self._version = await self.client.server_version()
        return self._version


def plain(error: TopkdError) -> str:
    """Shorten an error to what happened, without endpoint and advice."""
    return error.what if error.got is None else f"{error.what}: {error.got}"
