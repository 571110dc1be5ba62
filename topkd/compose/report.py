"""``report``: write the HTML page of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from topkd.engine import EngineConfig
from topkd.report.load.collection import gather
from topkd.report.page.content import Page, build_content
from topkd.report.page.html import render_page
from topkd.topk.errors import ConfigError

_FIRST_BYTES = b"<!doctype html"


def write_page(runs: Sequence[Path], out: Path | None = None) -> tuple[Page, Path, int]:
    """Write one HTML page about runs or a comparison; return the page, its path and its size in bytes.

    Args:
        runs: Folders of runs, or of one comparison.
        out: File to write; None takes ``report.html`` in the folder of a single run, else in the working directory.
    """
    page = build_content(gather(list(runs)), baseline=EngineConfig().model_dump(mode="json"))
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    text = render_page(page).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size and not _is_page(path):
            raise ConfigError(
                "file exists and is not a topkd report",
                where=str(path),
                hint="choose another --out: this file is not overwritten",
            )
        path.write_bytes(text)
    except OSError as error:
        raise ConfigError("cannot write the page", where=str(path), got=error.strerror) from error
    return page, path, len(text)


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_FIRST_BYTES)).lower() == _FIRST_BYTES
