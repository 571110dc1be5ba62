"""``topkd train``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.display import Display
from topkd.cli.dry_run import dry_run_command
from topkd.cli.extras import needs
from topkd.cli.outcomes import ended, first_process
from topkd.cli.watch import watched


def command(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, metrics and provenance.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, as in --set objective.kind=gjs; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its newest checkpoint; steps may grow.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at everything the run needs, show what it would do, do nothing.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the run's report on loopback while it goes on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last records as JSON on standard output.")] = False,
) -> None:
    """Distil on-policy from a served teacher.

    Example: topkd train run.toml --out runs/first --set steps=200
    """
    from topkd.compose.config import load_config

    run_config = load_config(config, overrides or [], lambda line: typer.echo(f"note: {line}", err=True))
    needs("train", "torch", "transformers", "safetensors", extra="train")
    if dry_run:
        dry_run_command(run_config, served=True, as_json=as_json)
        return
    from topkd.compose.stops import Stops
    from topkd.compose.train import train

    with (
        Stops() as stops,
        Display(quiet=not first_process()) as display,
        watched(out, display, wanted=watch and first_process()),
    ):
        result = asyncio.run(train(run_config, out, display, resume=resume, stops=stops))
    ended(result, "done", again=f"topkd train {config} --out {out} --resume", as_json=as_json)
