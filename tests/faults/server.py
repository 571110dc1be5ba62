"""A loopback server that tells the truth, or misbehaves on command."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import ssl
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from tests.clients.replies import score_body, score_rows

VOCAB = 2048
BOMB = gzip.compress(b" " * 40_000_000, 1)  # 1 : 200
KEY = "sk-secret-0123456789"
# What a real vLLM 0.33 answers while it is paused: tests/golden/vllm-0.33.0/y2_paused_completions.json.
PAUSED = {"error": {"message": "Generation is paused. Please retry after it resumes.",
                    "type": "ServiceUnavailableError", "param": None, "code": 503}}  # fmt: skip


def truth(ids: list[int], k: int) -> list[dict[int, tuple[float, int]] | None]:
    """The rows of a teacher that is a hash of the prompt: the same everywhere, another for every prompt."""
    _, rows = score_rows(len(ids), k, seed=zlib.crc32(np.array(ids, dtype="<i4").tobytes()), vocab=VOCAB)
    # score_rows draws its own prompt; the realised token of each row is renamed to the one that was sent.
    out: list[dict[int, tuple[float, int]] | None] = [None]
    for position, row in enumerate(rows[1:], 1):
        values, names = list(row.values()), list(row)
        names = [ids[position], *(t for t in names[1:])]
        taken = {ids[position]}
        for i in range(1, len(names)):
            while names[i] in taken:
                names[i] = (names[i] + 1) % VOCAB
            taken.add(names[i])
        out.append(dict(zip(names, values, strict=True)))
    return out


def actual_logp(ids: list[int], start: int, k: int) -> np.ndarray:
    rows = truth(ids, k)
    return np.float32([rows[i][ids[i]][0] for i in range(start + 1, len(ids))])


def body_of(request: dict[str, Any], change: Callable | None = None) -> bytes:
    ids, k = request["prompt"], request["prompt_logprobs"]
    rows = truth(ids, k)
    if change:
        change(ids, rows)
    return score_body(np.array(ids), rows)


def _middle(ids, rows) -> int:
    return len(rows) - 2


def row_short(ids, rows):
    rows.pop()


def row_long(ids, rows):
    rows.append(rows[-1])


def shifted(ids, rows):
    rows[1:-1] = rows[2:]


def wrong_ids(ids, rows):
    i = _middle(ids, rows)
    rows[i] = {(t + 1) % VOCAB if t == ids[i] else t: v for t, v in rows[i].items()}


def null_row(ids, rows):
    rows[_middle(ids, rows)] = None


def k_minus_1(ids, rows):
    i = _middle(ids, rows)
    del rows[i][next(t for t, (_, rank) in rows[i].items() if t != ids[i])]


def k_plus_1(ids, rows):
    i = _middle(ids, rows)
    low = min(v for v, _ in rows[i].values())
    extra = next(t for t in range(VOCAB) if t not in rows[i])
    rows[i][extra] = (low - 1, len(rows[i]) + 1)
    if len(rows[i]) == len(rows[i - 1]):  # the realised token already was one more
        rows[i][next(t for t in range(VOCAB) if t not in rows[i])] = (low - 2, len(rows[i]) + 1)


def mass_above_1(ids, rows):
    i = _middle(ids, rows)
    rows[i] = {t: (-0.2, rank) for t, (_, rank) in rows[i].items()}


def past_vocab(ids, rows):
    i = _middle(ids, rows)
    rows[i] = {t if t == ids[i] else t + VOCAB: v for t, v in rows[i].items()}


def huge_int(ids, rows):
    i = _middle(ids, rows)
    rows[i] = {t if t == ids[i] else t + 10**30: v for t, v in rows[i].items()}


def plus_a_hundredth(ids, rows):
    i = _middle(ids, rows)
    logp, rank = rows[i][ids[i]]
    rows[i][ids[i]] = (logp - 0.01, rank)


CHANGES = {
    f.__name__: f
    for f in (
        row_short,
        row_long,
        shifted,
        wrong_ids,
        null_row,
        k_minus_1,
        k_plus_1,
        mass_above_1,
        past_vocab,
        huge_int,
    )
}


class FaultyServer:
    """Speaks just enough HTTP/1.1. ``plan(number, request)`` names the fault of each scoring request, or None."""

    def __init__(self, plan: Callable[[int, dict[str, Any]], str | None] = lambda n, r: None) -> None:
        self.plan = plan
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.scored = 0
        self.faults: Counter[str] = Counter()
        self.open = 0
        self.dropped = 0  # requests whose client left before the answer
        self.healthy = True
        self.pause = ""  # "reject" as vLLM from 0.33 on, "hold" as before
        self.rejected = self.asked_pause = 0
        self.has_is_paused = True
        self.frozen = False  # takes requests, /health too, and answers none until it thaws
        self.delay_s = 0.0
        self.redirect_to = ""
        self.tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def pause_for(self, seconds: float, how: str = "reject") -> None:
        """Pauses now, and resumes after a while."""
        self.pause = how
        asyncio.get_running_loop().call_later(seconds, self.resume)

    def resume(self) -> None:
        self.pause = ""

    async def stop(self) -> None:
        """Dies: no new connection, and the open ones are cut."""
        if self._server is not None:
            server, self._server = self._server, None
            for sock in server.sockets:  # a close between a connection's accept and its transport leaks its socket
                asyncio.get_running_loop().remove_reader(sock.fileno())
            await asyncio.sleep(0)
            server.close()
        for _ in range(5):  # what was accepted just before only becomes a task in the loop's next turns
            for task in (tasks := list(self._tasks)):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # accepted while it died
            writer.transport.abort()
            return
        self.open += 1
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.open -= 1
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        self.headers.append({"path": path, **headers})
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        while self.frozen:
            await self._hold(reader, 0.02)
        if self.redirect_to:
            return await _write(writer, b"", status=307, location=self.redirect_to + path)
        if path == "/health":
            return await _write(writer, b"", status=200 if self.healthy else 503)
        if path == "/v1/models":
            return await _write(writer, b'{"object":"list","data":[{"id":"t","max_model_len":4096}]}')
        if path == "/version":
            return await _write(writer, b'{"version":"0.32.0"}')
        if path == "/is_paused" and self.has_is_paused:
            self.asked_pause += 1
            return await _write(writer, b'{"is_paused":true}' if self.pause else b'{"is_paused":false}')
        if path != "/v1/completions" or method != "POST":
            return await _write(writer, b'{"detail":"Not Found"}', status=404)
        if self.pause == "reject":
            self.rejected += 1
            return await _write(writer, json.dumps(PAUSED).encode(), status=503)
        while self.pause:
            await self._hold(reader, 0.1)
        request = json.loads(raw)
        number = self.scored
        self.scored += 1
        self.requests.append(request)
        fault = self.plan(number, request)
        if self.delay_s:
            await self._hold(reader, self.delay_s)
        if fault is None:
            return await _write(writer, body_of(request))
        self.faults[fault] += 1
        return await self._misbehave(fault, request, reader, writer)

    async def _hold(self, reader: asyncio.StreamReader, seconds: float) -> None:
        """Works for a while; a client that hangs up is noticed, as a real server would."""
        gone = asyncio.ensure_future(reader.read(1))
        done, _ = await asyncio.wait({gone}, timeout=seconds)
        if done:
            self.dropped += 1
            raise ConnectionResetError
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)

    async def _misbehave(
        self, fault: str, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if fault in CHANGES:
            return await _write(writer, body_of(request, CHANGES[fault]))
        body = body_of(request)
        error = {"error": {"message": "an injected fault", "type": "x", "param": None, "code": 0}}
        said = json.dumps(error).encode()
        match fault:
            case "reset_before_header":
                return False
            case "reset_mid_header":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
            case "reset_mid_body":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
                await writer.drain()
            case "no_http":
                writer.write(b"hello, I am a mail server\r\n\r\n")
            case "endless_header":
                with contextlib.suppress(ConnectionError):
                    for i in range(5000):
                        writer.write(b"HTTP/1.1 200 OK\r\n" if i == 0 else b"x-%d: %s\r\n" % (i, b"y" * 100))
                        await writer.drain()
            case "drip":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
                for i in range(len(body)):
                    writer.write(body[i : i + 1])
                    await writer.drain()
                    await asyncio.sleep(0.02)
            case "stall_mid_body":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
                await self._hold(reader, 60)
            case "stall":
                await self._hold(reader, 60)
            case "429":
                return await _write(writer, said, status=429)
            case "429_retry_after":
                return await _write(writer, said, status=429, **{"retry-after": "0.05"})
            case "429_tomorrow":
                return await _write(writer, said, status=429, **{"retry-after": "86400"})
            case "500" | "503" | "409" | "408":
                return await _write(writer, said, status=int(fault))
            case "nan_500":
                text = b'{"error":{"message":"Out of range float values are not JSON compliant","code":500}}'
                return await _write(writer, text, status=500)
            case "html_502":
                return await _write(writer, b"<html><head><title>Bad Gateway</title></head></html>", status=502)
            case "html_200":
                return await _write(writer, b"<html><head><title>Sign in</title></head></html>")
            case "truncated_json":
                return await _write(writer, body[: len(body) * 2 // 3])
            case "invalid_json":
                return await _write(writer, body.replace(b'"rank"', b"rank", 1))
            case "nan":
                return await _write(writer, body.replace(b'"logprob":-', b'"logprob":NaN,"x":-', 1))
            case "null_logprob":
                at = body.rindex(b'"logprob":') + 10
                return await _write(writer, body[:at] + b"null" + body[body.index(b",", at) :])
            case "duplicate_id":
                return await _write(writer, _duplicate(body))
            case "gzip_bomb":
                return await _write(writer, BOMB, **{"content-encoding": "gzip"})
            case "brotli":
                return await _write(writer, body, **{"content-encoding": "br"})
            case "aborted" | "null_field" | "missing_field":
                reply = json.loads(body)
                if fault == "aborted":
                    reply["choices"][0]["finish_reason"] = "abort"
                reply["choices"][0]["prompt_logprobs"] = None
                if fault == "missing_field":
                    del reply["choices"][0]["prompt_logprobs"]
                return await _write(writer, json.dumps(reply).encode())
            case "no_choices":
                return await _write(writer, b'{"choices":[]}')
            case "empty_200":
                return await _write(writer, b"")
            case "endless_body":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                with contextlib.suppress(ConnectionError):
                    while True:
                        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                        await writer.drain()
            case "huge_announced":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n" + body)
                await self._hold(reader, 60)
            case "closed_keepalive":
                await _write(writer, body)  # a whole reply that promises keep-alive, and then the socket is gone
            case _:
                raise AssertionError(fault)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return False


def _duplicate(body: bytes) -> bytes:
    """The last row lists its first id twice."""
    at = body.rindex(b"},{") + 3
    entry = body[at : body.index(b"}", at) + 1]
    return body[:at] + entry + b"," + body[at:]


async def _write(writer: asyncio.StreamWriter, body: bytes, *, status: int = 200, **headers: str) -> bool:
    head = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "content-type: application/json"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    await writer.drain()
    return True


async def until(condition: Callable[[], object]) -> None:
    """Waits for what must come to pass, however slow the machine is."""
    async with asyncio.timeout(240):
        while not condition():
            await asyncio.sleep(0.01)


async def assert_nothing_left(*servers: FaultyServer) -> None:
    """No connection and no task outlives its client; the servers' own tasks are given time to see that it left."""
    me = asyncio.current_task()
    for _ in range(6000):
        if asyncio.all_tasks() == {me} and not any(server.open for server in servers):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"left: connections {[server.open for server in servers]}, {asyncio.all_tasks() - {me}}")
