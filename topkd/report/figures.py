"""The page's panels as figures for papers: one PNG and one SVG each, drawn by matplotlib from the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from topkd.report.palette import GROUPS
from topkd.report.payload import Page
from topkd.topk.errors import ConfigError

_COLOURS = GROUPS["light"]
_STYLES = ("-", (0, (5, 2)), (0, (1.5, 2)))
_RC = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.fonttype": "none",  # text stays text: it can be edited, and takes the paper's font
    "svg.hashsalt": "topkd",
    "text.parse_math": False,  # a label is a name that somebody chose, not a formula
}


def write_figures(page: Page, folder: Path) -> list[Path]:
    """Draw every panel that the page shows, and the settings seed by seed; returns the files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the figures' folder", where=str(folder), got=error.strerror) from error
    written: list[Path] = []
    with mpl.rc_context(_RC):
        for name, draw in _figures(page):
            figure = Figure(figsize=(3.5, 2.5), layout="constrained")
            draw(figure.subplots())
            for suffix, options in ((".png", {"dpi": 300}), (".svg", {"metadata": {"Date": None}})):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, **options)
                written.append(path)
    return written


def _figures(page: Page) -> Iterator[tuple[str, Any]]:
    axis = next(axis for axis in page.data["axes"] if axis["ok"] or axis["key"] == "step")
    for section in page.data["sections"]:
        for panel in section["panels"]:
            if panel["kind"] == "hist":
                yield panel["key"], lambda axes, panel=panel: _histogram(axes, page, panel)
                continue
            for prefixes, lines in panel["lines"].items():
                name = panel["key"] if prefixes in ("", page.data["prefixes"][0]) else f"{panel['key']}-{prefixes}"
                yield name, lambda axes, panel=panel, lines=lines: _panel(axes, page, panel, lines, axis)
    if sum(len(rank.values) for rank in page.verdict.ranks) > 1:
        yield "seeds", lambda axes: _seeds(axes, page)


def _panel(axes: Any, page: Page, panel: dict[str, Any], lines: list[dict[str, Any]], axis: dict[str, Any]) -> None:
    for line in lines:
        at, style, label = _look(page, line["g"])
        x, y = _known(line["x"].get(axis["key"]) or line["x"]["step"]), _known(line["y"])
        if line["role"] == "main":
            axes.plot(x, y, color=at, linestyle=style, lw=1.4, label=label, marker="o" if len(y) < 16 else "", ms=2.4)
        else:
            axes.plot(x, y, color=at, lw=0.6, alpha=0.35)
        if "lo" in line:
            axes.fill_between(x, _known(line["lo"]), _known(line["hi"]), color=at, alpha=0.15, lw=0)
    axes.set(title=panel["title"], xlabel=axis["label"], ylabel=panel["unit"])
    if len(page.groups) > 1:
        axes.legend()


def _histogram(axes: Any, page: Page, panel: dict[str, Any]) -> None:
    edges = panel["edges"]
    for line in panel["lines"]:
        at, style, label = _look(page, line["g"])
        closed = line["y"][1:-1] if len(line["y"]) == len(edges) + 1 else line["y"]
        shares = [100 * share for share in closed]
        axes.stairs(shares, edges[: len(shares) + 1], color=at, linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    axes.set(title=panel["title"], xlabel="new / rollout probability", ylabel=panel["unit"])
    if len(page.groups) > 1:
        axes.legend()


def _seeds(axes: Any, page: Page) -> None:
    ranks = [rank for rank in page.verdict.ranks if rank.values]
    for row, rank in enumerate(ranks):
        at, _, _ = _look(page, rank.group)
        axes.hlines(row, rank.end.low, rank.end.high, color=at, lw=2, alpha=0.5)
        axes.plot([one["value"] for one in rank.values], [row] * len(rank.values), "o", color=at, ms=3.5, alpha=0.7)
        axes.plot([rank.end.mean], [row], "|", color=at, ms=12, mew=2)
    axes.set_yticks(range(len(ranks)), [rank.label for rank in ranks])
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set(title="last value by seed, mean with 95 % interval", xlabel=f"{page.verdict.metric}, nats per token")


def _look(page: Page, group: int) -> tuple[str, Any, str]:
    """Colour, line style and label of a setting, as on the page."""
    turn = group // len(_COLOURS) % len(_STYLES)
    return _COLOURS[group % len(_COLOURS)], _STYLES[turn], page.groups[group].label


def _known(values: list[float | None]) -> list[float]:
    """Holes as NaN: matplotlib lifts its pen there."""
    return [float("nan") if value is None else value for value in values]
