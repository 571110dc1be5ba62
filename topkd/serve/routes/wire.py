"""Request and reply bodies, the API key, the size limit, and disconnected clients."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from topkd.serve.engine.refusal import Refusal, describe_malformed
from topkd.serve.routes.replies import encode_json

log = logging.getLogger(__name__)

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

# A probe of a load balancer has no key; everything that costs work or changes state needs one.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
GONE = 499


def json_reply(body: object, status: int = 200) -> Response:
    """Build a JSON response."""
    return Response(encode_json(body), status_code=status, media_type="application/json")


def answer_errors(handler: Handler) -> Handler:
    """Turn refusals into their bodies, and anything unforeseen into a 500 without a traceback on the wire."""

    async def route(request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return json_reply(refusal.body(), refusal.status)
        except Exception as error:
            log.exception("request to %s failed", request.url.path)
            unforeseen = Refusal(f"{type(error).__name__}: {error}", status=500, kind="InternalServerError")
            return json_reply(unforeseen.body(), 500)

    return route


def list_routes(handlers: Mapping[str, Handler], *methods: str) -> list[Route]:
    """List one route a path, with its errors answered."""
    return [Route(path, answer_errors(handler), methods=list(methods)) for path, handler in handlers.items()]


async def read(request: Request, kind: type[B], limit: int) -> B:
    """Read the body as ``kind``.

    Raises:
        Refusal: Not JSON, not of the right shape (400), more than ``limit`` bytes (413), or the client left (499).
    """
    raw = bytearray()
    try:
        async for part in request.stream():
            raw += part
            if len(raw) > limit:
                raise Refusal(
                    f"The request body is larger than {limit} bytes", status=413, kind="RequestEntityTooLarge"
                )
    except ClientDisconnect as error:
        raise make_disconnect_reply() from error
    try:
        decoded = msgspec.json.decode(raw) if raw.strip() else {}
    except msgspec.DecodeError as error:
        message = (
            f"1 validation error:\n  {{'type': 'json_invalid', 'loc': 'body', 'msg': 'JSON decode error: {error}'}}"
        )
        raise Refusal(message, kind="Bad Request", param="body") from error
    try:
        return kind.model_validate(decoded)
    except ValidationError as error:
        raise describe_malformed(error) from error


def make_disconnect_reply() -> Refusal:
    """Build the refusal that ends a handler whose client has disconnected."""
    return Refusal("The client closed the connection", status=GONE, kind="ClientClosedRequest")


async def cancel_if_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, and cancel it when the client disconnects first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise make_disconnect_reply()
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class KeyGuard:
    """Middleware that answers 401 to requests without the key, compared in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._admits(scope):
            await json_reply({"error": "Unauthorized"}, 401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(headers) == 1 and hmac.compare_digest(headers[0], self._expected)


def detail(_: Request, error: Exception) -> Response:
    """Answer wrong paths and methods in FastAPI's words, as vLLM does."""
    status: Any = getattr(error, "status_code", 500)
    return json_reply({"detail": getattr(error, "detail", "Internal Server Error")}, status)
