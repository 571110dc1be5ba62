"""The output and the exit code of ``score`` and ``sample``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from topkd.compose.bulk.config import JobReport

_SHOWN = 10  # refused rows that are named on a terminal


def print_report_and_exit(report: JobReport, lines: Callable[[], Sequence[str]], *, as_json: bool) -> None:
    """Print the report as lines or as JSON; exit with code 1 if rows are missing."""
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        for line in (*lines(), *_list_failures(report)):
            typer.echo(line)
    if not report.complete or (report.refused and not report.estimate):
        raise typer.Exit(1)


def format_counts(report: JobReport, done: str, ahead: str, others: Sequence[str]) -> str:
    """Format the count ``done`` (named ``ahead`` in an estimate), and those of ``others`` that are not zero."""
    parts = [f"{getattr(report, done)} {ahead if report.estimate else done}"]
    return ", ".join(parts + [f"{count} {name}" for name in others if (count := getattr(report, name))])


def format_cost(report: JobReport) -> str:
    """Format the cost if there is a price, in the currency of the price."""
    return "" if report.cost is None else f", cost {report.cost:.4f} (in the currency of the price)"


def _list_failures(report: JobReport) -> list[str]:
    lines = [f"  {number} x {what}" for what, number in report.reasons.items()]
    lines += [f"  row {refusal['row']}: {refusal['reason']}" for refusal in report.refusals[:_SHOWN]]
    if len(report.refusals) > _SHOWN:
        lines.append("  ... (--json lists the first 1,000)")
    if report.stopped:
        lines.append(f"stopped at {report.stopped}; raise it and run the same command again to continue")
    if report.failed:
        lines.append("the server did not answer for some rows; run the same command again for those")
    return lines
