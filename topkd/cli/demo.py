"""``topkd demo``."""

from __future__ import annotations

import asyncio
import dataclasses
import json
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


class ObjectiveName(StrEnum):
    """What the demo can minimise."""

    topk_pg = "topk_pg"
    gjs = "gjs"
    scalar_kl = "scalar_kl"


def command(
    objective: Annotated[ObjectiveName, typer.Option(help="What the student minimises.")] = ObjectiveName.topk_pg,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 150,
    seed: Annotated[int, typer.Option(min=0, help="Seeds prompts and rollouts.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the run goes: runs/demo-OBJECTIVE-seedSEED when left out.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
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
