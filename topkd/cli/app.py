"""``topkd``: the command line. One clear line on bad input, exit codes 0 (done), 1 (failed run), 2 (user's mistake)."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

import topkd
from topkd.cli import cache, compare, demo, export, probe, replay, report, sample, score, serve, train
from topkd.topk.errors import TopkdError

# What typer raises for a command line that does not fit: click's class, or its own copy of it, as its version has it.
_Misuse: type[Exception] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")

app = typer.Typer(
    name="topkd",
    help="Distil a teacher you can reach only through an API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.command)
app.command("train")(train.command)
app.command("compare")(compare.command)
app.command("score")(score.command)
app.command("sample")(sample.command)
app.command("replay")(replay.command)
app.add_typer(cache.app, name="cache")
app.command("serve")(serve.command)
app.command("probe")(probe.command)
app.command("report")(report.command)
app.command("export")(export.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topkd {topkd.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")] = False,
) -> None:
    """Options before the command."""
    if debug:
        os.environ["TOPKD_DEBUG"] = "1"


def main() -> None:
    """Entry point of the ``topkd`` script."""
    try:
        code = app(prog_name="topkd", standalone_mode=False)
    except TopkdError as error:
        _fail(f"error: {error}", error.exit_code)
    except _Misuse as error:
        _misused(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", 130)
    except BrokenPipeError:
        # The reader of our output went away (`topkd ... | head`); keep Python from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the last resort: a traceback is for --debug
        _fail(f"internal error: {type(error).__name__}: {error} (topkd --debug shows where)", 1)

    sys.exit(code if isinstance(code, int) else 0)


def _misused(error: Any) -> NoReturn:
    """A command that was written wrongly: one line, as for every other mistake."""
    message = str(error.format_message()).replace("Input should be", "it must be")
    context = getattr(error, "ctx", None)
    if message.strip():  # else it was called for its help, which has been shown
        where = "topkd" if context is None else context.command_path
        typer.echo(f"topkd: error: {' '.join(message.split()).rstrip('.')}; see {where} --help", err=True)
    sys.exit(error.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("TOPKD_DEBUG"):
        traceback.print_exc()
    typer.echo(f"topkd: {' '.join(message.split())}", err=True)
    sys.exit(code)
