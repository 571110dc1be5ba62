"""A server that reads from a script."""

from __future__ import annotations

import json
from typing import Any

from topkd.clients.http.transport import Reply, Request


class Script:
    """A transport that answers from a list, fails on an extra call, and remembers what it was sent.

    ``weights`` are its successive answers to ``GET /weight_info``, which is not mounted without any.
    """

    def __init__(self, *replies: tuple[int, Any] | Exception) -> None:
        self.replies, self.requests = list(replies), []
        self.weights: list[str] = []
        self.asked = 0

    async def send(self, request: Request) -> Reply:
        if (request.method, request.url) == ("GET", "http://h:8000/weight_info"):
            self.asked += 1
            if not self.weights:
                return Reply(404, {}, b'{"detail":"Not Found"}', request.url)
            return Reply(200, {}, json.dumps({"weight_version": self.weights.pop(0)}).encode(), request.url)
        self.requests.append(request)
        assert self.replies, f"an extra request: {request}"
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        status, body = reply
        return Reply(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode(), request.url)

    async def aclose(self) -> None:
        pass

    def body(self, number: int = -1) -> dict[str, Any]:
        return json.loads(self.requests[number].content)
