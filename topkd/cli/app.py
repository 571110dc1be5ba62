"""``topkd``: the command line. An error is one line; exit codes are 0 (done), 1 (failed run), 2 (wrong input)."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import topkd
from topkd.cli.commands import cache, compare, demo, export, probe, replay, report, sample, score, serve, train
from topkd.cli.options import flag, join_paragraphs
from topkd.topk.errors import TopkdError

# Typer's exception for a wrong command line: click's class, or typer's own copy of it, depending on the version.
_Misuse: type[Exception] = next(item for item in typer.BadParameter.__mro__ if item.__name__ == "ClickException")

_NAME = 120  # characters of a file's name in a message
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO}  # not the user's mistake: exit code 1

# Phrases of the parser, and plainer ones.
_PLAIN_WORDS = {
    "Input should be": "it must be",
    "it must be a valid integer, unable to parse string as an integer": "it must be a whole number",
    "it must be a valid number, unable to parse string as a number": "it must be a number",
    "Value error, ": "",
}


class _Interruptible(TyperGroup):
    """Ends a command that does not handle Ctrl-C with the message "stopped" and exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Newer versions of typer would exit without a message; here there is one, and --debug shows the place.
            _exit_with_message("stopped", 130)


app = typer.Typer(
    name="topkd",
    cls=_Interruptible,
    help="Distil a teacher you can reach only through an API.",
    epilog="Exit codes: 0 done; 1 failed or incomplete; 2 wrong command or input; 130 Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, modules in {
    "Start here": (demo, probe, serve),
    "Train": (train, replay, compare),
    "Results": (report, export),
    "Score cache": (score, sample),
}.items():
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        function = getattr(module, f"{name}_command")
        app.command(name, help=join_paragraphs(function), rich_help_panel=panel)(function)
app.add_typer(cache.app, name="cache", rich_help_panel="Score cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topkd {topkd.__version__}")
        raise typer.Exit


@app.callback()
def set_debug(
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, flag("--debug", "Show the traceback of an error.")] = False,
) -> None:
    """Apply the options that stand before the command."""
    if debug:
        os.environ["TOPKD_DEBUG"] = "1"


def main() -> None:
    """Run the ``topkd`` script."""
    try:
        _main()
    finally:
        # If Ctrl-C interrupts code that runs from text (a dataclass of a module that is loading), Python counts it as
        # not caught, and ``python -m`` then ends with it, whatever the exit code. The next exec resets this.
        exec("")  # noqa: S102


def _main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="topkd", standalone_mode=False)
    except TopkdError as error:
        _exit_with_message(f"error: {error}", error.exit_code)
    except _Misuse as error:
        _exit_on_misuse(error)
    except (KeyboardInterrupt, typer.Abort):
        _exit_with_message("stopped", 130)
    except BrokenPipeError:
        # The reader of the output has ended (`topkd ... | head`); prevent Python from writing to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the last resort: a traceback is for --debug
        if isinstance(error, OSError) and error.filename is not None:  # a name that is too long, a link to itself
            name = str(error.filename)
            name = name if len(name) < _NAME else f"{name[:_NAME]}..."
            what = f"error: a file or folder cannot be used ({name}): got {error.strerror}"
            _exit_with_message(what, 1 if error.errno in _FULL else 2)
        _exit_with_message(f"internal error: {type(error).__name__}: {error} (topkd --debug shows where)", 1)

    sys.exit(code if isinstance(code, int) else 0)


def _exit_on_misuse(error: Any) -> NoReturn:
    """Print one line about a wrong command, and exit."""
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    for words, ours in _PLAIN_WORDS.items():
        message = message.replace(words, ours)
    if message:  # else only the help was requested, and shown
        context = getattr(error, "ctx", None)
        known = {item.name for item in app.registered_commands} | {item.name for item in app.registered_groups}
        called = [word for word in sys.argv[1:2] if word in known]
        where = " ".join(["topkd", *called]) if context is None else context.command_path
        typer.echo(f"topkd: error: {message}; see {where} --help", err=True)
    sys.exit(error.exit_code)


def _exit_with_message(message: str, code: int) -> NoReturn:
    if os.environ.get("TOPKD_DEBUG"):
        traceback.print_exc()
    typer.echo(f"topkd: {' '.join(message.split())}", err=True)
    sys.exit(code)
