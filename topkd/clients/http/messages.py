"""One HTTP exchange as values: the request, the reply, and its body while it comes in. No library, no socket."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from topkd.topk.errors import ResponseError, ServerTimeoutError

SLOW = "is the server stuck? raise read_timeout_s or read_timeout_per_token_s if it is only slow"


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


class ReplyBody:
    """Collects a reply's body: never more than ``max_bytes`` of it, inflated within the same bound."""

    def __init__(self, request: Request, headers: Mapping[str, str]) -> None:
        self._request, self._chunks, self.size = request, list[bytes](), 0
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"", "identity", "gzip", "deflate"}:
            raise ResponseError("the reply is encoded in a way we did not ask for", where=request.url, got=encoding)
        is_packed = encoding in {"gzip", "deflate"}
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32) if is_packed else None
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced) > request.max_bytes:
            raise self._too_large(f"{announced} bytes announced")
        self._note_bytes = request.on_bytes or _ignore_bytes
        self._note_bytes()

    def add(self, chunk: bytes) -> None:
        """Add bytes as they came."""
        self._note_bytes()
        if self._inflate is not None:
            try:
                chunk = self._inflate.decompress(chunk, self._request.max_bytes + 1 - self.size)
            except zlib.error as error:
                raise self._broken(str(error)) from error
        self._chunks.append(chunk)
        self.size += len(chunk)
        if self.size > self._request.max_bytes:
            raise self._too_large(f"more than {self._request.max_bytes} bytes")

    def join(self) -> bytes:
        """Return the whole body."""
        if self._inflate is not None and self.size and not self._inflate.eof:
            raise self._broken("a stream without its end")
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def stalled(self) -> ServerTimeoutError:
        """Build the error for silence in the middle."""
        return ServerTimeoutError(
            "the reply stopped in the middle",
            where=f"{self._request.method} {self._request.url}",
            got=f"{self.size} bytes, then nothing for {self._request.stall_s:.3g} s",
            hint="raise stall_timeout_s if the way is only slow",
        )

    def _broken(self, got: str) -> ResponseError:
        return ResponseError("the reply's compression is broken", where=self._request.url, got=got)

    def _too_large(self, got: str) -> ResponseError:
        return ResponseError(
            "the reply is too large",
            where=self._request.url,
            got=got,
            expected=f"at most {self._request.max_bytes}",
            hint="max_reply_bytes",
        )


def _ignore_bytes() -> None:
    """Do nothing."""
