"""``--watch``: the report of a run, served on loopback while the run goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from topkd.cli.display import Display
from topkd.cli.extras import needs


@contextlib.contextmanager
def watched(out: Path, display: Display, *, wanted: bool) -> Iterator[None]:
    """Serve the page of the run in ``out`` until it ends, and say where; nothing unless ``wanted``."""
    if not wanted:
        yield
        return
    needs("--watch", "jinja2", extra="report")
    from topkd.engine import EngineConfig
    from topkd.report.live import serve_run

    with serve_run(out, baseline=EngineConfig().model_dump(mode="json")) as page:
        display.note(f"follow the run at {page.url}")
        yield
