"""A recording of ``topkd probe --record``, played back over loopback to whoever asks exactly what was asked then."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.clients.probing import served
from topkd.clients.http.recorder import MANIFEST, RecordedExchange, read_exchange

FOLDER = Path(__file__).parent
RECORDINGS = sorted(path.parent for path in FOLDER.glob(f"*/{MANIFEST}"))


@dataclass
class Recording:
    """One folder: what the manifest states, and the exchanges in order."""

    manifest: dict[str, Any]
    exchanges: list[RecordedExchange]
    unexpected: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @contextmanager
    def replaying(self) -> Iterator[str]:
        """The recorded server at a URL. Equal requests get their replies in order; any other gets a 500, and a note."""
        left: dict[tuple[str, str, bytes], deque[RecordedExchange]] = defaultdict(deque)
        self.unexpected.clear()
        for exchange in self.exchanges:
            left[exchange.request.method, exchange.request.path, exchange.request.body.content].append(exchange)

        def handler(method: str, path: str, body: bytes) -> tuple[int, bytes]:
            waiting = left.get((method, path, body))
            if not waiting:
                self.unexpected.append(f"{method} {path} {body[:300].decode(errors='replace')}")
                return 500, b"{}"
            exchange = waiting.popleft()
            assert exchange.reply is not None
            return exchange.reply.status, exchange.reply.body.content

        with served(handler, raw=True) as url:
            yield url
        self.unused = [f"{e.number:03d} {e.request.method} {e.request.path}" for queue in left.values() for e in queue]


def load_recording(folder: Path) -> Recording:
    """Read a folder; a file that is no exchange, and a number that is missing, are errors."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    exchanges = [read_exchange(path) for path in sorted(folder.glob("*.json")) if path.name != MANIFEST]
    assert [exchange.number for exchange in exchanges] == list(range(1, manifest["exchanges"] + 1)), folder
    return Recording(manifest, exchanges)
