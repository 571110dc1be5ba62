"""Record what is sent to a server and what it answers: one readable file an exchange, byte for byte, keys masked.

A body that is compact JSON is written indented, with its numbers as the server wrote them: without the white space it
is the body again (``RecordedBody.content``). Any other body is text, or base64.
"""

from __future__ import annotations

import base64
import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from topkd.clients.http.masking import MASK, SecretMask
from topkd.clients.http.transport import Reply, Request, Transport
from topkd.topk.errors import ConfigError, TopkdError

FORMAT = 1
MANIFEST = "manifest.json"
MOST_BODY_BYTES, MOST_BYTES = 4 * 2**20, 32 * 2**20
_CUT_BYTES = 4096  # what is kept of a body above the bound
# Others name the host, the moment or the connection.
_HEADERS = ("content-type", "location", "retry-after", "retry-after-ms", "server", "www-authenticate", "x-should-retry")
_PART = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+')
_SPACE = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")|\s+')


class RecordedBody(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A body in the one of four forms that fits it; without any it was empty.

    Attributes:
        json: Compact JSON, indented.
        text: Other text.
        base64: Other bytes.
        cut: The beginning of a body above the bound.
        size: Bytes of a body that was cut.
    """

    json: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    text: str = ""
    base64: str = ""
    cut: str = ""
    size: int = 0

    @property
    def content(self) -> bytes:
        """Return the body as it was sent."""
        if isinstance(self.json, msgspec.Raw):
            return compact_json(bytes(self.json))
        return base64.b64decode(self.base64) if self.base64 else self.text.encode()


class RecordedRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A request: ``path`` has the query, and the prefix of the base URL."""

    method: str
    path: str
    headers: dict[str, str] = {}
    body: RecordedBody = msgspec.field(default_factory=RecordedBody)


class RecordedReply(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A reply with the headers that matter; ``path`` only where a redirect led elsewhere."""

    status: int
    headers: dict[str, str] = {}
    path: str = ""
    body: RecordedBody = msgspec.field(default_factory=RecordedBody)


class RecordedExchange(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A request, and its reply or the error in place of one."""

    number: int
    request: RecordedRequest
    reply: RecordedReply | None = None
    error: str = ""
    seconds: float = 0.0


def read_exchange(path: Path) -> RecordedExchange:
    """Read one file of a recording."""
    return msgspec.json.decode(path.read_bytes(), type=RecordedExchange)


class Recorder:
    """A transport that writes every exchange of the transport under it into a folder.

    The clients that share it do not close it: ``finish`` does, and writes the manifest.

    Args:
        folder: A folder that is new or empty.
        transport: Sends the requests.

    Raises:
        ConfigError: the folder holds something, or cannot be written to.
    """

    def __init__(self, folder: str | Path, transport: Transport) -> None:
        self.folder, self._transport = Path(folder), transport
        self.mask = SecretMask()
        self.exchanges = self.bytes = self.cut = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = next(self.folder.iterdir(), None)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        if held is not None:
            raise ConfigError(
                "the folder of a recording must be new or empty",
                where=str(self.folder),
                got=held.name,
                hint="name another one",
            )

    async def send(self, request: Request) -> Reply:
        """Send a request, and record it with its reply or its error."""
        self.mask.learn(request.private)
        self.exchanges += 1
        exchange = RecordedExchange(self.exchanges, self._request(request))
        started = time.perf_counter()
        try:
            reply = await self._transport.send(request)
            exchange.reply = self._reply(request, reply)
        except TopkdError as error:
            exchange.error = self.mask.hide_text(f"{type(error).__name__}: {error}")
            raise
        else:
            return reply
        finally:
            exchange.seconds = round(time.perf_counter() - started, 4)
            route = re.sub(r"[^A-Za-z0-9_.-]+", "-", exchange.request.path.partition("?")[0]).strip("-")[:60]
            self._write(f"{exchange.number:03d}-{request.method}-{route}.json", exchange)

    async def aclose(self) -> None:
        """Leave the connections open: other clients of the same recording use them."""

    async def finish(self, manifest: Mapping[str, Any]) -> None:
        """Close the connections, and write the manifest; a recording of nothing leaves no folder."""
        await self._transport.aclose()
        if not self.exchanges:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            return
        counts = {"exchanges": self.exchanges, "masked": self.mask.hidden, "cut": self.cut}
        self._write(
            MANIFEST, msgspec.Raw(self.mask.hide(msgspec.json.encode({"format": FORMAT, **manifest, **counts})))
        )

    def _request(self, request: Request) -> RecordedRequest:
        headers = {**request.headers, **dict.fromkeys(request.private, MASK)}
        return RecordedRequest(request.method, self._path(request.url), headers, self._body(request.content or b""))

    def _reply(self, request: Request, reply: Reply) -> RecordedReply:
        headers = {name: self.mask.hide_text(reply.headers[name]) for name in _HEADERS if name in reply.headers}
        elsewhere = self._path(reply.url) if reply.url not in {"", request.url} else ""
        return RecordedReply(reply.status, headers, elsewhere, self._body(reply.body))

    def _path(self, url: str) -> str:
        parts = urlsplit(url)
        return self.mask.hide_text(parts.path + (f"?{parts.query}" if parts.query else ""))

    def _body(self, content: bytes) -> RecordedBody:
        size = len(content)
        if size > MOST_BODY_BYTES or self.bytes + size > MOST_BYTES:
            self.cut += 1
            read = _CUT_BYTES + self.mask.margin
            shown = self.mask.hide(content[:read])
            if size > read:  # a key may be cut off at the end, where the mask does not find it
                shown = shown[: -self.mask.margin]
            return RecordedBody(cut=shown[:_CUT_BYTES].decode("utf-8", "replace"), size=size)
        self.bytes += size
        content = self.mask.hide(content)
        if not content:
            return RecordedBody()
        try:
            text = content.decode()
            msgspec.json.decode(content)
            is_compact = compact_json(content) == content
        except UnicodeDecodeError:
            return RecordedBody(base64=base64.b64encode(content).decode())
        except (msgspec.DecodeError, RecursionError):  # lists in lists, thousands deep
            is_compact = False
        return RecordedBody(json=msgspec.Raw(content)) if is_compact else RecordedBody(text=text)

    def _write(self, name: str, value: object) -> None:
        try:
            text = indent_json(msgspec.json.encode(value).decode()) + "\n"
            (self.folder / name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise _cannot_write(self.folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError("cannot write the recording", where=str(folder), got=error.strerror or type(error).__name__)


def compact_json(text: bytes) -> bytes:
    """Return JSON without the white space between its tokens."""
    return _SPACE.sub(lambda found: found[1] or b"", text)


def indent_json(text: str) -> str:
    """Indent compact JSON without changing a token: what holds no list or object stays on its line."""
    items: list[list[str]] = [[]]
    brackets: list[str] = []
    nested = [False]
    for part in _PART.findall(text):
        if part in {"[", "{"}:
            nested[-1] = True
            brackets.append(part)
            items.append([])
            nested.append(False)
            continue
        value = part
        if part in {"]", "}"}:
            inner, margin = items.pop(), " " * len(brackets)
            lines = f"\n{margin}" + f",\n{margin}".join(inner) + f"\n{margin[1:]}"
            value = brackets.pop() + (lines if nested.pop() else ", ".join(inner)) + part
        elif part == ",":
            continue
        elif part == ":":
            items[-1][-1] += ": "
            continue
        if items[-1] and items[-1][-1].endswith(": "):
            items[-1][-1] += value
        else:
            items[-1].append(value)
    return "".join(items[0])
