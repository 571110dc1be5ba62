"""``topkd demo``."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from topkd.cli.options import AsJson, option, require_extra
from topkd.cli.output.progress import Display
from topkd.cli.output.run_summary import CODES

if TYPE_CHECKING:
    from topkd.compose.run.run import RunResult


def demo_command(
    objective: Annotated[
        Literal["topk_pg", "gjs", "scalar_kl"], option("Loss of the student: topk_pg, gjs or scalar_kl.", "KIND")
    ] = "topk_pg",
    steps: Annotated[int, option("Optimiser steps.", "N", min=1)] = 150,
    seed: Annotated[int, option("Random seed of prompts and rollouts.", "N", min=0)] = 0,
    out: Annotated[
        Path | None,
        option("A new or empty folder; default: runs/demo-OBJECTIVE-seedSEED.", "FOLDER"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Distil a tiny teacher over HTTP, all on this machine, and show what the student learnt.

    Example: topkd demo --objective gjs --seed 1
    """
    require_extra("demo", "torch", "transformers", "starlette", "uvicorn", "matplotlib", extra="train,serve,report")
    from topkd.compose.demo import DemoResult, demo
    from topkd.compose.run.signals import StopSignals

    with StopSignals() as signals, Display() as display:
        result = asyncio.run(demo(objective, steps=steps, seed=seed, out=out, progress=display, signals=signals))
    if not isinstance(result, DemoResult):
        print_stopped_and_exit(result)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), default=str))
        return
    console = Console()
    table = Table(title=f"held-out, exact over the whole vocabulary ({result.before['eval_tokens']} positions)")
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"reverse_kl": "KL(student || teacher)", "forward_kl": "KL(teacher || student)", "jsd": "JSD"}
    for key, name in names.items():
        before, after = result.before[key], result.after[key]
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after / before:.3f}")
    agree = [100 * record["agreement"] for record in (result.before, result.after)]
    table.add_row("same top token", f"{agree[0]:.1f} %", f"{agree[1]:.1f} %", f"{agree[1] / agree[0]:.2f}")
    console.print(table)
    for who, text in result.samples.items():
        console.print(Text(who, style="bold"))
        console.print(Padding(Text(text.rstrip("\n") or "(nothing)"), (0, 0, 1, 2)))
    learnt = f"trained on {result.tokens} tokens in {result.seconds['distil']:.0f} s"
    files = f"curve: {result.figure}, run log: {result.out / 'metrics.jsonl'}"
    console.print(f"{learnt}; {files}", highlight=False, soft_wrap=True)
    console.print()
    for line in list_next_steps(_shorten_path(result.run_file)):
        console.print(Text(line, style="" if line.startswith(" ") else "bold"), soft_wrap=True)


def _shorten_path(path: Path) -> Path:
    """Make a path below the working directory relative to it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def list_next_steps(run_file: Path) -> list[str]:
    """List the commands to type next, indented below their purpose.

    ``make demo`` runs in an environment that may not be active; each terminal must then activate it first.
    """
    from topkd.compose.demo_assets.first_run import PORT
    from topkd.compose.demo_assets.folders import find_free_folder

    script, out = Path(sys.executable).with_name("topkd"), find_free_folder(Path("runs/first"))
    activate, topkd = _shorten_path(script.with_name("activate")), "topkd"
    first: list[str] = []
    if shutil.which("topkd") is None and script.exists():
        if activate.exists():
            first = [f"  source {shlex.quote(str(activate))}"]
        else:
            topkd = shlex.quote(str(_shorten_path(script)))
    return [
        'The same pair as a run of your own. In one terminal, until it says "ready":',
        *first,
        f"  {topkd} serve {shlex.quote(str(run_file.with_name('teacher')))} --port {PORT}",
        "In another:",
        *first,
        f"  {topkd} train {shlex.quote(str(run_file))} --out {out}",
        f"  {topkd} report {out}",
        f"Then open {out / 'report.html'} in a browser.",
    ]


def print_stopped_and_exit(result: RunResult) -> NoReturn:
    """Print the files of a stopped demo, and exit with the signal's code."""
    out, steps = _shorten_path(result.out), len(result.steps)
    kept = f"run log and student so far: {out} (topkd report {out})" if steps else f"{out} has no step yet"
    typer.echo(f"topkd: {result.stopped}: stopped after step {steps}; {kept}", err=True)
    raise typer.Exit(CODES[result.stopped])
