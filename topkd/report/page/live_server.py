"""Serves the report of a running run on loopback, updated once per second.

Only this machine can reach it. A request for another host name is refused: the page of another site whose name points
to this address must not read it. The server reads only the run's folder, and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from topkd.report.load.collection import Collection, count_cells, gather
from topkd.report.page.content import Page, build_content
from topkd.report.page.html import render_fragments, render_page
from topkd.topk.errors import ConfigError, DataError

_HOST = "127.0.0.1"
_SHARE = 0.1  # largest share of one core's time, because the process that trains may serve the page


class LivePage:
    """A page that follows runs, which may not have begun yet, until it is closed; a context manager."""

    def __init__(self, paths: Sequence[Path], port: int = 0, baseline: Mapping[str, Any] | None = None) -> None:
        self.paths, self.baseline = list(paths), baseline
        self._lock = threading.Lock()
        self._cells = [count_cells(path) for path in self.paths]
        self._collection: Collection = gather(self.paths, waiting=True)
        self._page: Page | None = None
        self._version = 1
        self._rest_until = 0.0
        handler = type("Handler", (_Handler,), {"live": self})
        try:
            self._server = ThreadingHTTPServer((_HOST, port), handler)
        except OSError as error:
            raise ConfigError(
                "cannot serve the page", where=f"{_HOST}:{port}", got=error.strerror, hint="give another --port, or 0"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True, name="topkd-page")
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the port on which the server listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Return the URL to open in a browser."""
        return f"http://{_HOST}:{self.port}/"

    def news(self) -> tuple[int, Page]:
        """Return a version number, which changes with the content, and the page.

        To read a long run takes time: the last page is returned again until ten times that time has passed.
        """
        with self._lock:
            began = time.monotonic()
            if self._page is not None and began < self._rest_until:
                return self._version, self._page
            if self._refresh():
                self._version += 1
                self._page = None
            if self._page is None:
                self._page = build_content(self._collection, live=True, baseline=self.baseline)
                ended = time.monotonic()
                self._rest_until = ended + (ended - began) * (1.0 / _SHARE - 1.0)
            return self._version, self._page

    def _refresh(self) -> bool:
        """Read new records and new runs of a comparison; return whether there were any."""
        now = [count_cells(path) for path in self.paths]
        if now == self._cells:
            # If another run has replaced the one in the folder, the old run log is gone: read everything again.
            with contextlib.suppress(DataError):
                changed = [run.refresh() for run in self._collection.runs]
                return any(changed)
        self._collection, self._cells = gather(self.paths, waiting=True), now
        return True

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    live: LivePage
    protocol_version = "HTTP/1.0"  # one connection per reply: a kept-alive one would stay open after the page

    def do_GET(self) -> None:
        """Reply with the page, its updates, or one rollout."""
        if self.headers.get("Host", "").lower() not in {f"{name}:{self.live.port}" for name in (_HOST, "localhost")}:
            self._reply(403, "text/plain", "This page is served to this machine only.\n")
            return
        parts = urlsplit(self.path)
        try:
            version, page = self.live.news()
        except DataError as error:
            self._reply(500, "text/plain", f"{error}\n")
            return
        if parts.path == "/":
            self._reply(200, "text/html", render_page(page, live=True))
        elif parts.path == "/data.json":
            self._news(version, page, parse_qs(parts.query).get("since", [""])[0])
        elif parts.path.startswith("/rollout/") and (body := _find_rollout(page, parts.path)) is not None:
            self._reply(200, "application/json", body)
        else:
            self._reply(404, "text/plain", "nothing here\n")

    def _news(self, version: int, page: Page, since: str) -> None:
        if since == str(version):
            self._reply(204, "application/json", "")
            return
        news = {"version": str(version), "data": page.data, "html": render_fragments(page)}
        self._reply(200, "application/json", json.dumps(news, allow_nan=False))

    def _reply(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing: the terminal shows the run."""


def _find_rollout(page: Page, path: str) -> str | None:
    index = path.removeprefix("/rollout/").removesuffix(".json")
    bodies = page.transcripts.bodies
    return bodies[int(index)] if index.isdecimal() and int(index) < len(bodies) else None
