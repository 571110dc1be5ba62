"""``topkd train``."""

from __future__ import annotations

import asyncio

import typer

from topkd.cli.options import AsJson, DryRun, Overrides, Resume, RunFile, RunFolder, Watch, require_extra
from topkd.cli.output.dry_run_page import run_dry_run
from topkd.cli.output.progress import Display
from topkd.cli.output.run_summary import (
    hint_resume,
    is_first_process,
    print_result_and_exit,
    resume_command,
    serve_page,
)


def train_command(
    config: RunFile,
    out: RunFolder,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Distil on-policy: the student samples, a teacher scores what it sampled, the student learns.

    The teacher is served, in this process, or the student itself behind another prompt. Ctrl-C keeps the student so far
    and says how to go on. Exit code 1: the run ended early, 2: it could not start as written.

    Example: topkd train run.toml --out runs/first --set steps=200
    """
    from topkd.compose.config.run_config import load_config

    run_config = load_config(config, overrides or [], lambda line: typer.echo(f"note: {line}", err=True))
    require_extra("train", "torch", "transformers", "safetensors", extra="train")
    if dry_run:
        run_dry_run(run_config, served=True, out=out, resume=resume, as_json=as_json)
        return
    if not resume:  # a run that is finished needs nothing of it any more
        from topkd.compose.preflight.preflight import check_here

        check_here(run_config)  # before torch is imported, which takes seconds
    from topkd.compose.run.signals import StopSignals
    from topkd.compose.train import train

    onwards = resume_command("train", config, out, overrides or [])
    with (
        StopSignals() as signals,
        Display(quiet=not is_first_process()) as display,
        serve_page(out, display, wanted=watch and is_first_process()),
        hint_resume(out, onwards),
    ):
        result = asyncio.run(train(run_config, out, display, resume=resume, signals=signals))
    print_result_and_exit(result, "done", again=onwards, as_json=as_json)
