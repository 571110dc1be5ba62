"""``topkd demo``."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from topkd.cli.display import Display
from topkd.cli.extras import needs
from topkd.cli.options import AsJson, option


class ObjectiveName(StrEnum):
    """What the demo can minimise."""

    topk_pg = "topk_pg"
    gjs = "gjs"
    scalar_kl = "scalar_kl"


def command(
    objective: Annotated[
        ObjectiveName, option("What the student minimises: topk_pg, gjs or scalar_kl.", "KIND")
    ] = ObjectiveName.topk_pg,
    steps: Annotated[int, option("Optimiser steps.", "N", min=1)] = 150,
    seed: Annotated[int, option("Seeds prompts and rollouts.", "N", min=0)] = 0,
    out: Annotated[
        Path | None, option("Where the run goes; runs/demo-OBJECTIVE-seedSEED when left out.", "FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Distil a tiny teacher over real HTTP, on this machine alone, and show what it did.

    Example: topkd demo --objective gjs --seed 1
    """
    needs("demo", "torch", "transformers", "starlette", "uvicorn", "matplotlib", extra="train,serve,report")
    from topkd.compose.demo import demo

    with Display() as display:
        result = asyncio.run(demo(objective.value, steps=steps, seed=seed, out=out, progress=display))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), default=str))
        return
    console = Console()
    table = Table(title=f"held-out, exact over the whole vocabulary ({result.before['eval_tokens']} positions)")
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="left" if not column else "right")
    for key, name in (
        ("reverse_kl", "KL(student || teacher)"),
        ("forward_kl", "KL(teacher || student)"),
        ("jsd", "JSD"),
    ):
        before, after = result.before[key], result.after[key]
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after / before:.3f}")
    agree = [100 * record["agreement"] for record in (result.before, result.after)]
    table.add_row("same top token", f"{agree[0]:.1f} %", f"{agree[1]:.1f} %", f"{agree[1] / agree[0]:.2f}")
    console.print(table)
    for who, text in result.samples.items():
        console.print(Text(who, style="bold"))
        console.print(Padding(Text(text.rstrip("\n") or "(nothing)"), (0, 0, 1, 2)))
    console.print(
        f"{result.tokens} tokens learnt from in {result.seconds['distil']:.0f} s; curve: {result.figure}, "
        f"diary: {result.out / 'metrics.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )
    own = _shown(result.run_file)
    console.print(Text("\nThe same pair as a run of your own, in two terminals:", style="bold"))
    for line in (f"serve {own.with_name('teacher')} --port 8000", f"train {own} --out runs/first"):
        console.print(f"  {_topkd()} {line}", highlight=False, soft_wrap=True)


def _shown(path: Path) -> Path:
    """Relative to the working folder where it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _topkd() -> str:
    """The command as this reader can type it: ``make demo`` runs in an environment that need not be active."""
    script = Path(sys.executable).with_name("topkd")
    return "topkd" if shutil.which("topkd") or not script.exists() else str(_shown(script))
