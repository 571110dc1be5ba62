"""Options that several commands have, and how every option is shown: a word for its value, none for a flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from topkd.topk.errors import ConfigError


def join_paragraphs(command: Callable[..., None]) -> str:
    """The docstring of a command with each paragraph on one line: terminals break it where they end."""
    text = inspect.cleandoc(command.__doc__ or "")
    return "\n\n".join(part.replace("\n", " ") for part in text.split("\n\n"))


def flag(name: str, says: str, *, panel: str | None = None) -> Any:
    """An option that is there or not."""
    return typer.Option(name, help=says, metavar="", rich_help_panel=panel)


def option(
    says: str, takes: str, *names: str, panel: str | None = None, one_of: Iterable[str] = (), **more: Any
) -> Any:
    """An option with a value.

    Args:
        says: Its help.
        takes: The word that stands for the value in help pages: URL, N, FOLDER.
        names: How it is written, where that is not the parameter's own name.
        panel: The box of the help page it belongs to.
        one_of: Values that shells complete; the config of the command checks what was given.
        more: Passed on to ``typer.Option``.
    """
    if words := tuple(one_of):
        more["autocompletion"] = lambda incomplete: [word for word in words if word.startswith(incomplete)]
    return typer.Option(*names, help=says, metavar=takes, rich_help_panel=panel, **more)


CODECS = ("packed", "raw", "cold")

AsJson = Annotated[bool, flag("--json", "Print the result as JSON on standard output, and nothing else there.")]
ApiKeyEnv = Annotated[str | None, option("Environment variable that holds the API key.", "NAME")]

RunFile = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="RUN.toml")]
RunFolder = Annotated[Path, option("Folder for checkpoint, metrics and provenance.", "FOLDER")]
Overrides = Annotated[
    list[str] | None,
    option("As in --set objective.kind=gjs: over what the file says; repeatable.", "KEY=VALUE", "--set"),
]
Resume = Annotated[bool, flag("--resume", "Go on in --out from its newest checkpoint; steps may grow.")]
DryRun = Annotated[bool, flag("--dry-run", "Look at everything the run needs, show what it would do, do nothing.")]
Watch = Annotated[bool, flag("--watch", "Serve the run's report on this machine while it goes on.")]

COST = "Tokens and cost"  # a panel
CacheOut = Annotated[Path, option("Folder of the cache.", "CACHE")]
CodecName = Annotated[str, option("packed (fp16 logprobs), raw (exact) or cold (smallest).", "NAME", one_of=CODECS)]
InFlight = Annotated[int, option("Requests at once at most.", "N", min=1)]
Limit = Annotated[int | None, option("Read this many rows at most.", "N", min=1)]
MaxCost = Annotated[float | None, option("Stop before more is spent.", "X", panel=COST)]
Strict = Annotated[bool, flag("--strict", "Stop at the first row that is refused.")]


def require_extra(command: str, *modules: str, extra: str) -> None:
    """Raise one clear line when a module of the extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"topkd {command} needs {', '.join(missing)}", hint=f"install them with: pip install 'topkd[{extra}]'"
        )
