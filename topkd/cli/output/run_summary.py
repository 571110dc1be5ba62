"""Output of train and replay: progress, the live page, the result, and the command that resumes the run."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from topkd.cli.options import require_extra
from topkd.cli.output.progress import Display, print_result

if TYPE_CHECKING:
    from topkd.compose.run.run import RunResult
    from topkd.compose.run.signals import StopSignals

# Exit codes: a stop on a service manager's SIGTERM is a success, and shells expect 130 after Ctrl-C.
CODES = {"SIGTERM": 0, "SIGINT": 130}


def is_first_process() -> bool:
    """Return whether this process prints: the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def resume_command(command: str, config: Path, out: Path, overrides: list[str], *, cache: Path | None = None) -> str:
    """Return the command line that continues a run, with the options that it was started with."""
    words = [*_launch_words(), command, str(config), *(["--cache", str(cache)] if cache else []), "--out", str(out)]
    for pair in overrides:
        words += ["--set", pair]
    return shlex.join([*words, "--resume"])


def _launch_words() -> list[str]:
    """Return ``topkd``, or torchrun with the same number of processes: another number changes the completions."""
    size, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "RANK" not in os.environ or size == "1":
        return ["topkd"]
    nodes = [] if size == here else ["--nnodes", os.environ.get("GROUP_WORLD_SIZE", str(int(size) // int(here)))]
    return ["torchrun", *nodes, "--nproc-per-node", here, "-m", "topkd"]


@contextlib.contextmanager
def open_terminal(out: Path, again: str, *, watch: bool) -> Iterator[tuple[Display, StopSignals]]:
    """Show a run's progress and handle its stop signals; see ``serve_page`` and ``hint_resume``."""
    from topkd.compose.run.signals import StopSignals

    is_first = is_first_process()
    with (
        StopSignals() as signals,
        Display(quiet=not is_first) as display,
        serve_page(out, display, wanted=watch and is_first),
        hint_resume(out, again),
    ):
        yield display, signals


@contextlib.contextmanager
def hint_resume(out: Path, again: str) -> Iterator[None]:
    """Print the command ``again`` if the run in ``out`` fails after it has saved a checkpoint."""
    from topkd.report.load.run_folder import RUN_LOG

    before = _find_write_time(out / RUN_LOG)
    try:
        yield
    except BaseException:
        if is_first_process() and _find_write_time(out / RUN_LOG) != before and _has_checkpoint(out):
            typer.echo(f"resume with: {again}", err=True)
        raise


def _has_checkpoint(out: Path) -> bool:
    from topkd.report.load.run_folder import CHECKPOINTS

    return any((out / CHECKPOINTS).glob("step-*"))


def _find_write_time(file: Path) -> int | None:
    """Return when a file was last written; None if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def print_result_and_exit(result: RunResult, verb: str, *, again: str, as_json: bool) -> None:
    """Print how the run ended, and exit with its code; standard output has only the result.

    Args:
        result: The result of the run.
        verb: Word for what was done.
        again: The command that resumes it.
        as_json: Print the result as strict JSON.
    """
    if not is_first_process():
        raise typer.Exit(CODES.get(result.stopped, 0))
    if result.already:
        typer.echo(f"{result.out} is finished: {len(result.steps)} steps; nothing to resume", err=True)
    if result.stopped:
        hint = "resume with" if _has_checkpoint(result.out) else "there is no checkpoint: start over with"
        typer.echo(f"{result.stopped}: stopped after step {len(result.steps)}; {hint}: {again}", err=True)
    if result.steps and (as_json or not result.stopped):
        print_result(result, verb, as_json=as_json)
    if result.stopped:
        raise typer.Exit(CODES.get(result.stopped, 1))


@contextlib.contextmanager
def serve_page(out: Path, display: Display, *, wanted: bool) -> Iterator[None]:
    """Serve the page of the run in ``out`` until it ends, and print its address; do nothing unless ``wanted``."""
    if not wanted:
        yield
        return
    require_extra("--watch", "jinja2", extra="report")
    from topkd.engine import EngineConfig
    from topkd.report.page.live_server import LivePage

    with LivePage([out], baseline=EngineConfig().model_dump(mode="json")) as page:
        display.note(f"follow the run at {page.url}")
        yield
