"""``topkd replay``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import AsJson, DryRun, Overrides, Resume, RunFile, RunFolder, Watch, option, require_extra
from topkd.cli.output.dry_run_page import run_dry_run
from topkd.cli.output.run_summary import open_terminal, print_result_and_exit, resume_command


def replay_command(
    config: RunFile,
    out: RunFolder,
    cache: Annotated[Path | None, option("The cache; default: cache.path of the run's file.", "FOLDER")] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Train from a cache, without a server: repeat the recorded run, or learn from its completions in random order.

    Example: topkd replay run.toml --cache cache --out runs/again
    """
    from topkd.compose.config.run_config import load_config

    run_config = load_config(config, overrides or [], lambda line: typer.echo(f"note: {line}", err=True))
    require_extra("replay", "torch", "transformers", "safetensors", extra="train")
    if dry_run:
        run_dry_run(run_config, served=False, out=out, resume=resume, as_json=as_json, cache=cache)
        return
    from topkd.compose.replay import replay

    onwards = resume_command("replay", config, out, overrides or [], cache=cache)
    with open_terminal(out, onwards, watch=watch) as (display, signals):
        result = asyncio.run(replay(run_config, out, display, cache=cache, resume=resume, signals=signals))
    print_result_and_exit(result, "replayed", again=onwards, as_json=as_json)
