"""``topkd train``."""

from __future__ import annotations

import asyncio

import typer

from topkd.cli.options import AsJson, DryRun, Overrides, Resume, RunFile, RunFolder, Watch, require_extra
from topkd.cli.output.dry_run_page import run_dry_run
from topkd.cli.output.run_summary import open_terminal, print_result_and_exit, resume_command


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

    The teacher is a server, a model in this process, or the student itself with another prompt. Ctrl-C saves the
    student and prints the command that resumes the run. Exit code 1: the run failed or ended early. 2: a wrong setting.

    Example: topkd train run.toml --out runs/first --set steps=200
    """
    from topkd.compose.config.run_config import load_config

    run_config = load_config(config, overrides or [], lambda line: typer.echo(f"note: {line}", err=True))
    require_extra("train", "torch", "transformers", "safetensors", extra="train")
    if dry_run:
        run_dry_run(run_config, served=True, out=out, resume=resume, as_json=as_json)
        return
    if not resume:  # a finished run needs none of these files
        from topkd.compose.preflight.preflight import check_here

        check_here(run_config)  # before torch is imported, which takes seconds
    from topkd.compose.train import train

    onwards = resume_command("train", config, out, overrides or [])
    with open_terminal(out, onwards, watch=watch) as (display, signals):
        result = asyncio.run(train(run_config, out, display, resume=resume, signals=signals))
    print_result_and_exit(result, "done", again=onwards, as_json=as_json)
