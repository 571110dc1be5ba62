"""One server address: admission, tries, status and decoding, in this order, for every dialect."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
from pydantic import SecretStr

from topkd.clients.config import ClientConfig
from topkd.clients.http.admission import Admission, MemoryBudget, Permit
from topkd.clients.http.metrics import Metrics
from topkd.clients.http.retry import PauseBudget, Total, Try, with_retries
from topkd.clients.http.status_errors import error_from_reply
from topkd.clients.http.transport import HttpTransport, Reply, Request, Transport
from topkd.clients.http.watchdog import Watchdog
from topkd.topk.errors import (
    ConfigError,
    ResponseError,
    RetryableServerError,
    ServerBusyError,
    ServerPausedError,
    ServerTimeoutError,
    TopkdError,
)

Result = TypeVar("Result")
_HOST_AND_PORT = re.compile(r"[\w.-]+(:\d{1,5})?(/v1)?")
_INLINE_BYTES = 32_768  # below this a hop to a thread costs more than the decoding
_PAUSE_ASKED_S = 5.0  # how long the server may take to say whether it is paused
_PAUSE_KNOWN_S = 0.5  # an answer about a pause serves every request that waits


class _Pause(msgspec.Struct):
    is_paused: bool


_PAUSE = msgspec.json.Decoder(_Pause)


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What a request asks for: it decides time-outs, bounds and messages.

    Attributes:
        tokens: Prompt tokens plus tokens to generate: the time-out grows with them.
        entries: (token, logprob) pairs expected in the reply: its size is bounded by them, admission counts them.
        k: K asked for, for messages.
        model: Model asked for, for messages.
        single_try: The request is sent once: repeating it could do harm.
    """

    tokens: int = 0
    entries: int = 0
    k: int = 0
    model: str = ""
    single_try: bool = False


class Endpoint:
    """Sends requests to one base URL and turns replies into values, or into one of our errors.

    Args:
        base_url: ``http(s)://host:port``; a trailing ``/v1`` is cut off.
        api_key: As for ``load_key``.
        config: Bounds and time-outs.
        budget: Shared with the other replicas of a fleet.
        metrics: Shared likewise.
        transport: In place of ``HttpTransport``.
        key_header: Header that carries the key; ``authorization`` as a bearer token.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | SecretStr | None = None,
        config: ClientConfig | None = None,
        budget: MemoryBudget | None = None,
        metrics: Metrics | None = None,
        transport: Transport | None = None,
        key_header: str = "authorization",
    ) -> None:
        self.url = normalize_url(base_url)
        self.config = config or ClientConfig()
        self.metrics = metrics or Metrics()
        self.gate = Admission(self.config, self.metrics, budget)
        self._key, self._key_header = load_key(api_key, where=self.url), key_header
        self._transport = transport or HttpTransport(self.config)
        self._threads: ThreadPoolExecutor | None = None
        self._watchdog = Watchdog(self.config.watchdog_s, self.answers, self.metrics)
        self._pause_asked_at = self._pause_asked_until = -math.inf
        self._tells_pause, self._paused = True, False

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    async def call(
        self,
        method: str,
        path: str,
        body: Callable[[Try], object] | object | None = None,
        *,
        decode: Callable[[bytes], Result],
        where: str = "",
        asks: RequestInfo = RequestInfo(),
        response_retries: int = 0,
        within_s: float | None = None,
    ) -> Result:
        """Send one request and decode its reply.

        Args:
            method: HTTP method.
            path: Route, with its leading slash.
            body: What goes as JSON, or a function of the try that builds it (a retry may have to differ).
            decode: Pure; bytes to a checked value. Runs in a thread when the reply is large.
            where: Endpoint, model and request for error messages.
            asks: What the request asks for.
            response_retries: Tries left after a reply that failed its checks.
            within_s: A try takes no longer, whatever the config allows.
        """
        where = where or f"{self.url}{path}"
        patience_s = min(self.config.try_timeout_s(asks.tokens), within_s or math.inf)

        async def attempt(this_try: Try) -> Result:
            permit = await self.gate.enter(max(1, asks.entries), where=where)
            try:
                this_try.total.start()
                content = body(this_try) if callable(body) else body
                request = Request(
                    method,
                    self.url + path,
                    None if content is None else msgspec.json.encode(content),
                    {} if content is None else {"content-type": "application/json"},
                    self._private(),
                    timeout_s=max(0.001, min(patience_s, this_try.total.remaining_s)),
                    max_bytes=self.config.reply_bound(asks.entries),
                    stall_s=self.config.stall_timeout_s,
                    on_bytes=self._watchdog.note_bytes,
                )
                return await self._once(request, decode, permit, where=where, asks=asks)
            except ServerTimeoutError as error:
                # What is sent once may be slow because of a pause that its own sender began: no reason to wait.
                if not asks.single_try and await self.is_paused():
                    raise ServerPausedError("the server is paused and holds requests", where=where) from error
                raise
            finally:
                permit.release()

        if asks.single_try or self.config.max_retries == 0:
            pauses = PauseBudget(self.config, self.metrics, self.is_paused)
            return await pauses.outlast(attempt, Try(0, Total(self.config.total_timeout_s)))
        return await with_retries(
            attempt, self.config, self.metrics, response_retries=response_retries, is_paused=self.is_paused
        )

    async def is_paused(self) -> bool:
        """Ask ``GET /is_paused`` past the gate, for all who wait at once; False where the server does not tell.

        vLLM has the route in development mode, which is also what it takes to pause one.
        """
        clock = asyncio.get_running_loop().time
        # Another request asks, perhaps in another event loop (no Event serves both), which may have been stopped.
        while clock() < self._pause_asked_until:  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.05)
        if self._tells_pause and clock() - self._pause_asked_at >= _PAUSE_KNOWN_S:
            self._pause_asked_until, self._paused = clock() + 1.2 * _PAUSE_ASKED_S, False
            try:
                reply = await self._get("/is_paused", _PAUSE_ASKED_S)
            finally:
                self._pause_asked_until, self._pause_asked_at = -math.inf, clock()
            self._tells_pause = reply is None or reply.status not in {404, 405}
            if reply is not None and reply.status == 200:
                with contextlib.suppress(msgspec.DecodeError):
                    self._paused = _PAUSE.decode(reply.body).is_paused
        return self._paused

    async def ping(self, path: str, *, timeout_s: float = 5.0) -> bool:
        """Send one short GET past the gate: a replica full of stuck requests can still be probed."""
        return await self._status(path, timeout_s) == 200

    async def answers(self) -> bool:
        """Check that ``GET /health`` brings anything but a failure: a server without that route lives too."""
        return 0 < await self._status("/health", min(5.0, self.config.watchdog_s or 5.0)) < 500

    async def _status(self, path: str, timeout_s: float) -> int:
        """Return the status of one short GET past the gate; 0 when there is none."""
        reply = await self._get(path, timeout_s)
        return 0 if reply is None else reply.status

    async def _get(self, path: str, timeout_s: float) -> Reply | None:
        """Send one short GET past the gate; None when nothing comes back."""
        request = Request("GET", self.url + path, private=self._private(), timeout_s=timeout_s, max_bytes=65_536)
        try:
            return await self._transport.send(request)
        except (OSError, ResponseError):
            return None

    async def aclose(self) -> None:
        """Close connections and decoding threads."""
        self.gate.close()
        await self._watchdog.aclose()
        await self._transport.aclose()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    async def _once(
        self, request: Request, decode: Callable[[bytes], Result], permit: Permit, *, where: str, asks: RequestInfo
    ) -> Result:
        self.metrics.add("tries")
        try:
            async with self._watchdog.over(where):
                reply = await self._transport.send(request)
        except RetryableServerError as error:
            # A slow server is no more helped by the same number of requests than an absent one.
            permit.replied(overload=True)
            self.metrics.add("timeouts" if isinstance(error, ServerTimeoutError) else "transport_errors")
            raise
        self.metrics.add("reply_bytes", len(reply.body))
        if reply.status != 200:
            failed = error_from_reply(reply, where=where, k=asks.k, model=asks.model)
            busy = isinstance(failed, ServerBusyError) and not isinstance(failed, ServerPausedError)
            permit.replied(overload=busy, neutral=True)
            self.metrics.add(f"http_{reply.status}")
            raise failed
        permit.replied()
        return await self._decode(reply, decode, where)

    async def _decode(self, reply: Reply, decode: Callable[[bytes], Result], where: str) -> Result:
        started = time.perf_counter()
        try:
            if len(reply.body) <= _INLINE_BYTES:
                return decode(reply.body)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.config.decode_workers, thread_name_prefix="topkd-decode")
            return await asyncio.get_running_loop().run_in_executor(self._threads, decode, reply.body)
        except ResponseError as error:
            self.metrics.add("bad_replies")
            raise add_location(error, where) from error
        except ServerPausedError as error:
            raise add_location(error, where) from error
        finally:
            self.metrics.add("decode_s", time.perf_counter() - started)

    def _private(self) -> Mapping[str, str]:
        if self._key is None:
            return {}
        value = self._key.get_secret_value()
        return {self._key_header: f"Bearer {value}" if self._key_header == "authorization" else value}


def add_location(error: TopkdError, where: str) -> TopkdError:
    """Add endpoint, model and request to an error."""
    if where in error.where:
        return error
    place = f"{where}, {error.where}" if error.where else where
    return type(error)(error.what, where=place, got=error.got, expected=error.expected, hint=error.hint)


def normalize_url(base_url: str) -> str:
    """Return ``scheme://host[:port][/prefix]``, without a trailing slash or ``/v1``; refuse anything else."""
    text = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_ok = urlsplit(""), False
    if parts.username or parts.password:
        raise ConfigError("the base URL holds a user name or password", where=parts.hostname or "", hint="use api_key")
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_ok or parts.query or parts.fragment:
        meant = f"did you mean http://{text}?" if _HOST_AND_PORT.fullmatch(text) else ""
        raise ConfigError("not a base URL", got=repr(base_url), expected="http(s)://host:port", hint=meant)
    return text.removesuffix("/v1").rstrip("/")


def load_key(api_key: str | SecretStr | None, *, where: str = "") -> SecretStr | None:
    """Load an API key, masked in repr.

    Args:
        api_key: ``"env:NAME"`` (an environment variable), ``"file:PATH"`` (its first line), a key, or None for none.
        where: Endpoint for the error message.
    """
    if api_key is None:
        return None
    value = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    if value.startswith("env:"):
        name = value.removeprefix("env:")
        if not os.environ.get(name):
            raise ConfigError(
                f"environment variable {name} is not set", where=where, hint=f"export {name}=<the API key>"
            )
        value = os.environ[name]
    elif value.startswith("file:"):
        path = Path(value.removeprefix("file:")).expanduser()
        try:
            value = path.read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API key file {path}", where=where, got=type(error).__name__) from error
    value = value.strip()
    if not value:
        return None
    if not value.isascii() or not value.isprintable():
        # Refused here, without showing it: the HTTP layer would quote the whole header in its own error.
        raise ConfigError("the API key holds characters that an HTTP header cannot carry", where=where)
    return SecretStr(value)
