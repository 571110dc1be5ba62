"""Options that several commands share, and functions that declare options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from topkd.topk.errors import ConfigError


def join_paragraphs(command: Callable[..., None]) -> str:
    """Put each paragraph of a command's docstring on one line; terminals wrap it at their width."""
    text = inspect.cleandoc(command.__doc__ or "")
    return "\n\n".join(part.replace("\n", " ") for part in text.split("\n\n"))


def flag(name: str, says: str, *, panel: str | None = None) -> Any:
    """Declare an option without a value."""
    return typer.Option(name, help=says, metavar="", rich_help_panel=panel)


def option(
    says: str, takes: str, *names: str, panel: str | None = None, one_of: Iterable[str] = (), **more: Any
) -> Any:
    """Declare an option with a value.

    Args:
        says: Help text.
        takes: Word for the value in help pages: URL, N, FOLDER.
        names: Names of the option, if not the parameter's own name.
        panel: Box of the help page in which it is shown.
        one_of: Values that shells complete; the command's config checks them.
        more: Further arguments of ``typer.Option``.
    """
    if words := tuple(one_of):
        more["autocompletion"] = lambda incomplete: [word for word in words if word.startswith(incomplete)]
    return typer.Option(*names, help=says, metavar=takes, rich_help_panel=panel, **more)


CODECS = ("packed", "raw", "cold")

AsJson = Annotated[bool, flag("--json", "Print only the result, as JSON, on standard output.")]
ApiKeyEnv = Annotated[str | None, option("Environment variable that holds the API key.", "NAME")]

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]
RunFolder = Annotated[Path, option("Folder of the run: metrics, checkpoints, student.", "FOLDER")]
Overrides = Annotated[
    list[str] | None,
    option("Override a setting of the file, as in --set objective.kind=gjs; repeatable.", "KEY=VALUE", "--set"),
]
Resume = Annotated[bool, flag("--resume", "Continue the run in --out from its newest checkpoint.")]
DryRun = Annotated[bool, flag("--dry-run", "Check everything the run needs and show what it would do.")]
Watch = Annotated[bool, flag("--watch", "Serve a live report of the run on this machine.")]

COST = "Tokens and cost"  # a panel
CacheOut = Annotated[Path, option("Folder of the cache.", "CACHE")]
CodecName = Annotated[str, option("packed (fp16 logprobs), raw (exact) or cold (smallest).", "NAME", one_of=CODECS)]
InFlight = Annotated[int, option("Most requests at the same time.", "N", min=1)]
Limit = Annotated[int | None, option("Read at most this many rows.", "N", min=1)]
MaxCost = Annotated[float | None, option("Stop before spending more than this.", "X", panel=COST)]
Strict = Annotated[bool, flag("--strict", "Stop at the first invalid row.")]


def require_extra(command: str, *modules: str, extra: str) -> None:
    """Raise ConfigError if a module of the extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"topkd {command} needs {', '.join(missing)}", hint=f"install them with: pip install 'topkd[{extra}]'"
        )
