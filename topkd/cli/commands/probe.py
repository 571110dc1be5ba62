"""``topkd probe``."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from topkd.cli.options import ApiKeyEnv, AsJson, flag, option
from topkd.clients.dialects.records import list_dialects
from topkd.clients.probe.findings import Load, ProbeReport
from topkd.compose.config.api_keys import read_api_key
from topkd.topk.errors import TopkdError

DIALECTS = list_dialects()
_MARKS = {
    "ok": ("✓", "green"),
    "warn": ("!", "yellow"),
    "fail": ("✗", "bold red"),
    "info": ("·", "dim"),
    "unknown": ("?", "dim"),
}
_VALUE = 18  # columns of a finding's value
_PLAIN = {"✓": "+", "✗": "x", "·": "-"}


def probe_command(
    url: Annotated[str, typer.Argument(help="Base URL of the server, as in http://127.0.0.1:8000.", metavar="URL")],
    model: Annotated[str | None, option("Model name on the server; default: its only model.", "NAME")] = None,
    student: Annotated[
        str | None,
        option("Student's tokenizer (folder, tokenizer.json or cached id), to compare token ids.", "MODEL"),
    ] = None,
    dialect: Annotated[str, option("API of the server; auto detects it.", "NAME", one_of=DIALECTS)] = "auto",
    api_key_env: ApiKeyEnv = None,
    load: Annotated[bool, flag("--load", "Measure scoring speed under rising concurrency.")] = False,
    batch: Annotated[int, option("Sequences of a training step, to predict its time (--load).", "N", min=1)] = 256,
    tokens: Annotated[int, option("Tokens of each request (--load).", "N", min=16)] = 2048,
    record: Annotated[
        Path | None,
        option("Write every request and reply into this new folder, keys masked, to attach it to an issue.", "DIR"),
    ] = None,
    cached: Annotated[bool, flag("--cached", "Accept a report of the last hour, if the server is the same.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check what a server can do as a teacher, with real requests of a few tokens.

    Exit code 0: it can teach. 1: it cannot, or does not answer. 2: invalid arguments; no request was sent.

    Example: topkd probe http://127.0.0.1:8000 --student ./models/student
    """
    from topkd.clients.http.recorder import MANIFEST
    from topkd.clients.probe.probe import probe
    from topkd.compose.data.byte_maps import load_student_byte_map

    console = Console(highlight=False)
    is_new = record is not None and not (record / MANIFEST).exists()
    try:
        with Console(stderr=True, quiet=as_json).status("probing", spinner="line"):
            report = asyncio.run(
                probe(
                    url,
                    model=model,
                    student=None if student is None else load_student_byte_map(student),
                    dialect=dialect,
                    api_key=read_api_key(api_key_env, source="--api-key-env"),
                    load=load,
                    batch=batch,
                    load_tokens=tokens,
                    cached=cached,
                    record=record,
                )
            )
    except TopkdError:
        if record is not None and is_new and (record / MANIFEST).exists():
            typer.echo(describe_recording(record), err=True)
        raise
    if as_json:
        typer.echo(json.dumps(report.as_json(), allow_nan=False))
    else:
        print_probe(report, console)
    if record is not None:
        typer.echo(describe_recording(record), err=as_json)
    if not report.can_teach:
        sys.exit(1)


def describe_recording(folder: Path) -> str:
    """Describe in one line where a recording is, and what to look over before it is shared."""
    sizes = [path.stat().st_size for path in folder.iterdir()]
    where = f"recorded {len(sizes) - 1} exchanges in {folder} ({sum(sizes) / 1e6:.1f} MB)"
    care = "look over what the server states of itself (host, model, folders, flags, environment) before you share it"
    return f"{where}: {care}; keys are masked, and the prompts are topkd's own"


def print_probe(report: ProbeReport, console: Console) -> None:
    """Print the findings as a table, and the verdict as its last line."""
    ascii_only = (console.encoding or "").lower().replace("-", "") not in {"utf8", "utf16", "utf32"}
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, width=1)
    table.add_column(width=24)
    table.add_column(width=_VALUE)
    table.add_column(ratio=1, style="dim", overflow="fold")
    group = ""
    for finding in report.findings:
        if finding.group != group:
            if group:
                table.add_row("", "", "", "")
            group = finding.group
            table.add_row("", Text(group.upper(), style="bold"), "", "")
        mark, style = _MARKS[finding.status]
        shown = _PLAIN.get(mark, mark) if ascii_only else mark
        value = Text(finding.value, style=style if finding.status in {"warn", "fail"} else "not dim")
        detail = Text(finding.detail)
        if len(value) > _VALUE:  # a long value, such as a path, goes into the wide column
            value, detail = Text(), Text.assemble(value, " " * bool(detail), detail)
        table.add_row(Text(shown, style=style), Text(finding.title), value, detail)
    console.print(f"[bold]{escape(report.url)}[/bold]  [dim]{escape(report.dialect)} dialect[/dim]\n")
    console.print(table)
    if report.load is not None:
        _print_load(report.load, console)
    for line in report.advice:
        console.print(Text(f"advice: {line}", style="dim"))
    console.print(f"\n[dim]{report.requests} requests, {report.seconds:.1f} s[/dim]")
    console.print(Text(report.verdict, style="bold green" if report.can_teach else "bold red"), soft_wrap=True)


def _print_load(load: Load, console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left", header_style="dim")
    for name in ("in flight", "tokens/s", "p50", "p95", "failed"):
        table.add_column(name, justify="right")
    for level in load.levels:
        style = "bold" if level.concurrency == load.best else ""
        seconds = (f"{level.p50_s:.2f} s", f"{level.p95_s:.2f} s")
        speed = f"{level.tokens_per_s:,.0f}"
        table.add_row(str(level.concurrency), speed, *seconds, str(level.failed or ""), style=style)
    console.print(Text(f"\nSCORING UNDER LOAD  {load.prompt_tokens:,} tokens per request, K = {load.k}", style="bold"))
    console.print(table)
    end = "saturated" if load.saturated else "not saturated: it may do more"
    console.print(
        f"best at {load.best} in flight: {load.tokens_per_s:,.0f} tokens/s ({end}); "
        f"a step of {load.batch} x {load.prompt_tokens:,} tokens takes {3600 / load.steps_per_hour:.1f} s, "
        f"{load.steps_per_hour:,.0f} steps per hour when scoring is the limit"
    )
