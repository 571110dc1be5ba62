"""``topkd report``."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topkd.cli.options import AsJson, flag, option, require_extra
from topkd.topk.errors import ConfigError

if TYPE_CHECKING:
    from topkd.report.page.content import Page


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of one comparison.", metavar="RUN")],
    out: Annotated[Path | None, option("The page; default: RUN/report.html, report.html for several.", "FILE")] = None,
    figures: Annotated[Path | None, option("Also draw every panel as PNG and SVG into this folder.", "FOLDER")] = None,
    follow: Annotated[bool, flag("--follow", "Serve a live page on this machine while the run continues.")] = False,
    port: Annotated[int, option("Port of --follow; 0 takes a free one.", "N", min=0, max=65535)] = 0,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about runs or a comparison: the verdict first, then the details.

    Example: topkd report runs/first

    Example: topkd report runs/scalar-gjs --figures paper/figures

    Example: topkd report --follow runs/first
    """
    require_extra("report", "jinja2", *(["matplotlib"] if figures else []), extra="report")
    if follow:
        if out or figures:
            raise ConfigError("--follow takes no --out and no --figures", hint="write files without --follow")
        _follow(runs, port, as_json=as_json)
        return
    from topkd.compose.report import write_page

    page, path, size = write_page(runs, out)
    drawn = []
    if figures is not None:
        from topkd.report.page.figures import write_figures

        drawn = write_figures(page, figures)
    if as_json:
        typer.echo(json.dumps(_build_result(page, path, drawn), ensure_ascii=False))
        return
    if page.verdict.summary:
        typer.echo(page.verdict.summary)
    typer.echo(page.verdict.headline)
    if page.verdict.detail:
        typer.echo(page.verdict.detail)
    for warning in page.verdict.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"{path} ({size / 1e3:,.0f} kB, one complete file)")
    if drawn:
        typer.echo(f"{len(drawn)} figures in {figures}")


def _follow(runs: list[Path], port: int, *, as_json: bool) -> None:
    from topkd.engine import EngineConfig
    from topkd.report.page.live_server import LivePage

    for run in runs:
        if not run.is_dir():
            raise ConfigError("no run to follow", where=str(run), got="no such folder", expected="a run's --out folder")
    with contextlib.suppress(KeyboardInterrupt), LivePage(runs, port, EngineConfig().model_dump(mode="json")) as page:
        typer.echo(json.dumps({"url": page.url}) if as_json else f"{page.url} follows the run; Ctrl-C ends the page")
        while True:
            time.sleep(3600)


def _build_result(page: Page, path: Path, drawn: list[Path]) -> dict[str, Any]:
    statement = page.verdict
    return {
        "out": str(path),
        "summary": statement.summary,
        "headline": statement.headline,
        "detail": statement.detail,
        "metric": statement.metric,
        "ranks": [rank.to_json() for rank in statement.ranks],
        "results": [dict(zip(page.summary.columns, row, strict=True)) for row in page.summary.rows],
        "warnings": statement.warnings,
        "notes": page.notes,
        "figures": [str(file) for file in drawn],
    }
