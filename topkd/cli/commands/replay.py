"""``topkd replay``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import AsJson, DryRun, Overrides, Resume, RunFile, RunFolder, Watch, option, require_extra
from topkd.cli.output.dry_run_page import run_dry_run
from topkd.cli.output.progress import Display
from topkd.cli.output.run_summary import (
    hint_resume,
    is_first_process,
    print_result_and_exit,
    resume_command,
    serve_page,
)


def replay_command(
    config: RunFile,
    out: RunFolder,
    cache: Annotated[Path | None, option("The cache; cache.path of the run's file when left out.", "FOLDER")] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Train from a cache, with no server: the recorded run again, or its completions shuffled, under any objective.

    Example: topkd replay run.toml --cache cache --out runs/again
    """
    from topkd.compose.config.run_config import load_config

    run_config = load_config(config, overrides or [], lambda line: typer.echo(f"note: {line}", err=True))
    require_extra("replay", "torch", "transformers", "safetensors", extra="train")
    if dry_run:
        run_dry_run(run_config, served=False, out=out, resume=resume, as_json=as_json, cache=cache)
        return
    from topkd.compose.replay import replay
    from topkd.compose.run.signals import StopSignals

    onwards = resume_command("replay", config, out, overrides or [], cache=cache)
    with (
        StopSignals() as signals,
        Display(quiet=not is_first_process()) as display,
        serve_page(out, display, wanted=watch and is_first_process()),
        hint_resume(out, onwards),
    ):
        result = asyncio.run(replay(run_config, out, display, cache=cache, resume=resume, signals=signals))
    print_result_and_exit(result, "replayed", again=onwards, as_json=as_json)
