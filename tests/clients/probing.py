"""Servers to be probed, over real HTTP on loopback."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from topkd.clients.probe.findings import ProbeReport
from topkd.clients.probe.probe import probe


@contextmanager
def served(handler: Any, *, raw: bool = False) -> Iterator[str]:
    """``handler`` behind real HTTP on loopback; with ``raw`` it is given the bytes of the request's body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet a reply: the kernel delays the second of two small ones by 40 ms

        def answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, value = handler(self.command, self.path, sent if raw else json.loads(sent) if sent else None)
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def probed(handler: Any, **options: Any) -> ProbeReport:
    with served(handler) as url:
        return await probe(url, **options)
