"""``topkd compare``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from topkd.cli.options import AsJson, option, require_extra
from topkd.cli.output.formatting import format_bytes
from topkd.cli.output.progress import Display
from topkd.topk.errors import ConfigError

if TYPE_CHECKING:
    from topkd.compose.comparison.config import CompareConfig

_OUT = Path("runs/compare")
_HELP = "A comparison file (with arms), two or more run files, or one run file with --grid."
_Files = Annotated[list[Path] | None, typer.Argument(help=_HELP, metavar="COMPARISON")]
_GRID = "One arm per value, over the run file or the embedded pair; repeatable."
_Grid = Annotated[list[str] | None, option(_GRID, "KEY=VALUE,...", "--grid")]
_SET = "Setting of every arm, as in --set steps=100; repeatable."
_ForEveryArm = Annotated[list[str] | None, option(_SET, "KEY=VALUE", "--set")]


def compare_command(
    files: _Files = None,
    out: Annotated[Path, option("Folder of the comparison; an unfinished one is continued.", "FOLDER")] = _OUT,
    grid: _Grid = None,
    seeds: Annotated[str | None, option("Seeds of every arm; default: 0,1,2.", "N,...")] = None,
    workers: Annotated[int | None, option("Number of processes; default: one per core.", "N", min=1)] = None,
    overrides: _ForEveryArm = None,
    as_json: AsJson = False,
) -> None:
    """Train the same runs with several settings (arms) and seeds, and test which setting learns faster.

    Example: topkd compare examples/compare_scalar_gjs.toml --out runs/scalar-gjs

    Example: topkd compare --grid objective.kind=gjs,topk_pg --out runs/kinds
    """
    config = _load_config(files or [], grid or [], seeds, overrides or [])
    if workers is not None:
        config = config.model_copy(update={"workers": workers})
    require_extra("compare", "torch", "transformers", "safetensors", extra="train")
    from topkd.compose.compare import compare
    from topkd.report.load.run_folder import COMPARISON

    try:
        with Display(quiet=as_json) as display:
            result = compare(config, out, display)
    except KeyboardInterrupt:
        typer.echo(f"topkd: stopped; the same command continues the comparison in {out}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo((result.out / COMPARISON).read_text(encoding="utf-8").strip())
    else:
        _show(result.summary)
        typer.echo(f"\n{result.out / COMPARISON}; {_write_page(result.out)}")
    if not result.complete:
        for cell, reason in result.summary["failed"].items():
            typer.echo(f"topkd: cell {cell} failed: {reason}", err=True)
        raise typer.Exit(1)


def _write_page(out: Path) -> str:
    """Write the report's page, if its extra is installed; return its path, or how to get it."""
    if importlib.util.find_spec("jinja2") is None:
        return f"the page: pip install 'topkd[report]', then topkd report {out}"
    from topkd.compose.report import write_page

    return f"the page: {write_page([out])[1]}"


def _load_config(files: list[Path], grid: list[str], seeds: str | None, overrides: list[str]) -> CompareConfig:
    from topkd.compose.comparison.config import SEEDS, from_runs, load_compare, parse_grid
    from topkd.compose.config.run_config import read_toml

    wanted = _parse_seeds(seeds)
    if len(files) == 1 and not grid:
        if "arms" not in read_toml(files[0]):
            raise ConfigError(
                "a single run file cannot be compared", where=str(files[0]),
                hint="give a second one, --grid key=value,value, or a comparison file with [[arms]]",
            )  # fmt: skip
        return load_compare(files[0], overrides, wanted)
    if not files and not grid:
        raise ConfigError("nothing to compare", hint="give a comparison file, run files, or --grid key=value,value")
    return from_runs(files, parse_grid(grid), wanted or SEEDS, overrides)


def _parse_seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError("--seeds takes whole numbers", got=text, hint="as in --seeds 0,1,2") from None
    if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise ConfigError("--seeds takes different numbers of at least 0", got=text, hint="as in --seeds 0,1,2")
    return seeds


def _show(summary: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"\n{summary['verdict']['text']}", style="bold", markup=False, soft_wrap=True)
    for text in (summary["verdict"]["ends"], summary["note"]):
        if text:
            console.print(text, markup=False, soft_wrap=True)
    _build_table(console, summary, summary["live"]["arms"], "live, on-policy at staleness 0")
    if summary["replay"]:
        title = "matched replay: an off-policy test of the estimators"
        _build_table(console, summary, summary["replay"]["arms"], title)
        console.print(summary["replay"]["verdict"]["text"], markup=False, soft_wrap=True)


def _build_table(console: Console, summary: dict[str, Any], rows: list[dict[str, Any]], title: str) -> None:
    labels = {arm["name"]: arm["label"] for arm in summary["arms"]}
    rates = {arm["name"]: arm["lr"] for arm in summary["arms"]}
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, title_style="bold")
    table.add_column("arm", overflow="fold")
    if any(rates.values()):
        table.add_column("lr", justify="right")
    for name in ("final", "area/ref (95 %)", f"tokens to {summary['target']:g}", "teacher"):
        table.add_column(name, justify="right")
    for row in rows:
        cells: list[str | Text] = [Text(labels[row["arm"]])]  # brackets in a name are not markup
        if any(rates.values()):
            cells.append(f"{rates[row['arm']]:.2g}")
        cells += [
            _format_spread(row["final"]),
            _format_ratio(row["area_ratio"]) if row["arm"] != summary["reference"] else "reference",
            _format_reached(row),
            _format_cost(row),
        ]
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"final: held-out {summary['metric']}, mean ± standard deviation over seeds; area: mean of it over tokens; "
        "teacher: logprob bytes of a run, mean over seeds",
        style="dim", soft_wrap=True,
    )  # fmt: skip


def _format_spread(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f"±{value['sd']:.3f}")


def _format_ratio(ratio: dict[str, Any]) -> str:
    if ratio["ratio"] is None:
        return "-"
    spread = "" if ratio["low"] is None else f" ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return f"{ratio['ratio']:.3f}{spread}"


def _format_cost(row: dict[str, Any]) -> str:
    known = [fact["teacher_bytes"] for fact in row["seeds"].values()]
    return format_bytes(sum(known) / len(known)) if known else "-"


def _format_reached(row: dict[str, Any]) -> str:
    mean, runs = row["tokens_to_target"], len(row["seeds"])
    late = f" ({row['censored']}/{runs} never)" if row["censored"] else ""
    return "-" + late if mean is None else f"{mean:,.0f}{late}"
