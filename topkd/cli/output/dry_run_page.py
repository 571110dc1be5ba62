"""Output of ``--dry-run`` of train and replay: settings, data, estimates and problems."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from topkd.cli.output.formatting import format_bytes, format_count

if TYPE_CHECKING:
    from topkd.compose.config.run_config import RunConfig
    from topkd.compose.dry_run import DryRun, Rendered
    from topkd.compose.preflight.forecast import Forecast

_SHOWN = 1200  # characters of a prompt's beginning and of its end


def run_dry_run(
    config: RunConfig, *, served: bool, out: Path, resume: bool, as_json: bool, cache: Path | None = None
) -> None:
    """Show what the run would do; exit with code 2 if there are problems."""
    with Console(stderr=True, quiet=as_json).status("checking", spinner="line"):
        from topkd.compose.dry_run import dry_run

        found = asyncio.run(dry_run(config, served=served, out=out, resume=resume, cache=cache))
    if as_json:
        typer.echo(json.dumps(found.as_json(), default=str))
    else:
        print_dry_run(found, config, Console(highlight=False))
    if found.problems:
        raise typer.Exit(2)


def print_dry_run(found: DryRun, config: RunConfig, console: Console) -> None:
    """Print the findings of a dry run, the problems last."""
    mark = "" if console.is_terminal else "*"  # bold is lost in a file
    title = f"SETTINGS  ({mark or 'bold'}: set; the others are defaults, docs/defaults.md)"
    _print_section(console, title, _print_settings(found, mark=mark))
    for rendered in found.prompts:
        title = f"FIRST PROMPT, {rendered.side.upper()} ({rendered.tokens} tokens)"
        _print_section(console, title, _print_prompt(rendered))
    if any(rendered.parts[1:] for rendered in found.prompts):
        legend = Text.assemble("  ", ("prompt", "dim"), "  ", ("trained", "bold green"), "  ", ("masked", "yellow"))
        console.print(legend, Text(""), sep="\n")
    if found.data:
        _print_section(console, "DATA", _print_pairs(_print_data(found, config)))
    if found.forecast is not None:
        _print_section(console, "STUDENT", _print_pairs(_print_student(found, config, found.forecast)))
        _print_section(console, "WORK", _print_pairs(_print_work(config, found.forecast)))
    _print_section(console, "RUN", _print_pairs(_print_run(found, config)))
    if found.endpoints:
        _print_section(console, "ENDPOINTS", _print_pairs(_print_endpoints(found, config)))
    for word, style, texts in (("note", "yellow", found.notes), ("problem", "bold red", found.problems)):
        for text in texts:
            console.print(_print_pairs([(word, text)], style=style))
    if found.problems:
        count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
        console.print(Text(f"{count} found: this run would fail", style="bold red"))
    else:
        console.print(Text("no problem found: this run can start", style="green"))


def _print_endpoints(found: DryRun, config: RunConfig) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for endpoint in found.endpoints:
        fine = endpoint.can_teach and (endpoint.k is None or endpoint.k < 0 or endpoint.k >= config.k)
        mark = Text("✓ " if fine else "✗ ", style="green" if fine else "bold red")
        facts = ", ".join(part for part in (endpoint.model, endpoint.dialect) if part)
        about = endpoint.verdict
        if endpoint.can_teach and not fine:
            about = f"K = {config.k} is above its limit; it {about}"
        if facts:
            about += f" ({facts}; asked for K = {config.k})"
        rows.append((endpoint.teacher or "teacher", Group(Text(endpoint.url), mark + Text(about))))
    return rows


def _print_section(console: Console, title: str, body: Any) -> None:
    console.print(Text(title, style="bold"))
    console.print(Padding(body, (0, 0, 1, 2)))


def _print_pairs(rows: list[tuple[str, Any]], *, style: str = "dim") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(style=style, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), value if not isinstance(value, str) else Text(value))
    return table


def _print_run(found: DryRun, config: RunConfig) -> list[tuple[str, Any]]:
    objective = ", ".join(f"{key} {value}" for key, value in config.objective.model_dump().items() if key != "kind")
    rows = [
        ("objective", f"{config.objective.name}{f' ({objective})' if objective else ''}"),
        ("steps", f"{config.steps}, seed {config.seed}, staleness at most {config.max_staleness}"),
    ]
    if found.device:
        autocast = "" if config.learner.autocast == "off" else f", autocast {config.learner.autocast}"
        rows.append(("device", f"{found.device}, weights {config.student.dtype}{autocast}"))
    return rows


def _print_data(found: DryRun, config: RunConfig) -> list[tuple[str, Any]]:
    data = found.data
    own, on_teacher = data["prompt_tokens"], data["teacher_prompt_tokens"]
    rows = [
        ("file", config.data.path),
        ("rows", f"{data['rows']:,}, {data['dropped_overlong']:,} dropped as too long"),
        ("prompt tokens", f"median {own['median']}, longest {own['longest']} of {config.rollout.max_prompt_tokens}"),
    ]
    if data["privileged"]:
        differ = f"{data['privileged']:,} rows differ"
        rows.append(("teacher's", f"median {on_teacher['median']}, longest {on_teacher['longest']}; {differ}"))
    if data["with_completion"]:
        rows.append(("with an answer", f"{data['with_completion']:,}"))
    if len(data["by_teacher"]) > 1:
        rows.append(("by teacher", ", ".join(f"{name} {number:,}" for name, number in data["by_teacher"].items())))
    return rows


def _print_student(found: DryRun, config: RunConfig, forecast: Forecast) -> list[tuple[str, Any]]:
    model = forecast.model
    share = 100 * model.trained / model.parameters
    trained = f"{format_count(model.trained)} are trained ({share:.2g} %)" if share < 100 else "all are trained"
    parts = ", ".join(f"{name} {format_bytes(number)}" for name, number in forecast.memory.items())
    there = f" of {format_bytes(forecast.available)} on {found.device}" if forecast.available else ""
    return [
        ("model", config.student.model),
        ("parameters", f"{format_count(model.parameters)}; {trained}"),
        ("memory, about", f"{format_bytes(forecast.memory_total)}{there}: {parts}"),
    ]


def _print_work(config: RunConfig, forecast: Forecast) -> list[tuple[str, Any]]:
    epochs = f"{forecast.epochs:,.0f}" if forecast.epochs >= 10 else f"{forecast.epochs:.2g}"
    completions = f"{forecast.prompts_per_step} prompts x {config.rollout.samples_per_prompt} completions"
    rows = [
        ("epochs", f"{epochs} of the rows in {config.steps:,} step{'s' * (config.steps > 1)}"),
        ("per step", f"{completions}, at most {format_count(forecast.tokens_per_step)} tokens"),
    ]
    if forecast.teacher_requests_per_step:
        tokens, size = forecast.teacher_tokens_per_step, forecast.teacher_reply_bytes_per_step
        replies = f"{format_count(tokens)} tokens, replies about {format_bytes(size)}"
        rows.append(("teacher, per step", f"{forecast.teacher_requests_per_step:,} requests, {replies}"))
        tokens, size = forecast.totals["teacher_tokens"], forecast.totals["teacher_reply_bytes"]
        replies = f"{format_count(tokens)} tokens at most, replies about {format_bytes(size)}"
        rows.append(("teacher, total", f"{forecast.totals['teacher_requests']:,} requests, {replies}"))
    return rows


def _print_prompt(rendered: Rendered) -> Text:
    text = Text()
    for index, (part, is_trained) in enumerate(rendered.parts):
        style = "dim" if index == 0 else "bold green" if is_trained else "yellow"
        if len(part) > 2 * _SHOWN:
            left_out = len(part) - 2 * _SHOWN
            part = f"{part[:_SHOWN]}\n... {left_out:,} characters ...\n{part[-_SHOWN:]}"  # noqa: PLW2901
        text.append(part, style=style)
    return text


def _print_settings(found: DryRun, *, mark: str) -> Table:
    """Print the settings by table; those of the file or --set in bold, after ``mark``."""
    tables: dict[str, Text] = {}
    quiet = 0  # number of [client] settings that are not set
    for key, value, is_set in found.settings:
        table, dot, name = key.partition(".")
        if table == "client" and not is_set:
            quiet += 1
            continue
        text = tables.setdefault(table if dot else "run", Text())
        if text:
            text.append(", ", style="dim")
        text.append(f"{mark if is_set else ''}{name if dot else key} ", style="dim")
        text.append(_format_toml(value), style="bold" if is_set else "")
    if quiet:
        text = tables.setdefault("client", Text())
        text.append(f"{', ' if text else ''}{quiet} {'others ' if text else ''}at their defaults", style="dim")
    return _print_pairs(list(tables.items()))


def _format_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_format_toml(entry) for entry in value)}]"
    return json.dumps(value) if isinstance(value, str) else str(value)
