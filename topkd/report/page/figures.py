"""Draws the page's panels as figures for papers (PNG and SVG, with the same numbers), and the curve of the demo."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from topkd.report.page.content import Page
from topkd.report.page.palette import GROUPS
from topkd.topk.errors import ConfigError

_COLOURS = GROUPS["light"]
_STYLES = ("-", (0, (5, 2)), (0, (1.5, 2)))
_TITLE = 44  # characters in a line of a title
_INSIDE = 4  # largest number of legend entries inside the axes
_MARKERS = ("o", "s", "^", "D", "v", "P")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # distinguishable with every kind of colour vision
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
    "svg.fonttype": "none",  # text stays text: it can be edited, and gets the paper's font
    "svg.hashsalt": "topkd",
    "text.parse_math": False,  # a label is a name, not a formula
}


def write_figures(page: Page, folder: Path) -> list[Path]:
    """Draw every panel that the page shows, and the strip charts of seeds; return the files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("cannot make the figures' folder", where=str(folder), got=error.strerror) from error
    written: list[Path] = []
    with mpl.rc_context(_RC):
        for name, draw in _list_figures(page):
            figure = Figure(figsize=(3.5, 2.5), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            _draw_legend(figure, axes)
            for suffix, options in ((".png", {"dpi": 300}), (".svg", {"metadata": {"Date": None}})):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, **options)
                written.append(path)
    return written


def _list_figures(page: Page) -> Iterator[tuple[str, Any]]:
    axis = next(axis for axis in page.data["axes"] if axis["ok"] or axis["key"] == "step")
    for section in page.data["sections"]:
        for panel in section["panels"]:
            if panel["kind"] == "hist":
                yield panel["key"], lambda axes, panel=panel: _draw_histogram(axes, page, panel)
                continue
            for prefixes, lines in panel["lines"].items():
                name = panel["key"] if prefixes in ("", page.data["prefixes"][0]) else f"{panel['key']}-{prefixes}"
                yield name, lambda axes, panel=panel, lines=lines: _draw_panel(axes, page, panel, lines, axis)
    for measure in page.data["seeds"]:
        for name, strip in zip(("seeds", "paired"), measure["strips"], strict=False):
            yield (
                f"{name}-{measure['key']}",
                lambda axes, measure=measure, strip=strip: _draw_strip(axes, page, measure, strip),
            )


def _draw_panel(
    axes: Any, page: Page, panel: dict[str, Any], lines: list[dict[str, Any]], axis: dict[str, Any]
) -> None:
    for line in _select_shown(page, lines):
        at, style, marker, label = _choose_style(page, line["g"])
        x, y = _replace_holes(line["x"].get(axis["key"]) or line["x"]["step"]), _replace_holes(line["y"])
        if line["role"] == "main":
            every = max(1, len(y) // 6)  # a few markers, so that a line has a shape as well as a colour
            offset = line["g"] * every // max(1, len(page.groups))
            axes.plot(
                x, y, color=at, linestyle=style, lw=1.4, label=label, marker=marker, ms=3.2, markevery=(offset, every)
            )
        else:
            axes.plot(x, y, color=at, lw=0.6, alpha=0.35)
        if "lo" in line:
            axes.fill_between(x, _replace_holes(line["lo"]), _replace_holes(line["hi"]), color=at, alpha=0.15, lw=0)
    axes.set(title=textwrap.fill(panel["title"], _TITLE), xlabel=axis["label"], ylabel=panel["unit"])
    if panel["zero"]:
        axes.set_ylim(bottom=0.0)


def _draw_histogram(axes: Any, page: Page, panel: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    edges = panel["edges"]
    for line in _select_shown(page, panel["lines"]):
        at, style, _, label = _choose_style(page, line["g"])
        closed = line["y"][1:-1] if len(line["y"]) == len(edges) + 1 else line["y"]
        shares = [100 * share for share in closed]
        axes.stairs(shares, edges[: len(shares) + 1], color=at, linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_choose_ratio_ticks(edges)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:.3g}")  # by default, the ticks of this scale are formulas
    axes.set(title=panel["title"], xlabel="new / rollout probability", ylabel=panel["unit"])


def _choose_ratio_ticks(edges: list[float]) -> list[float]:
    """Choose about five powers of two, with 1 among them, because the labels of all would overlap."""
    low, high = (math.log2(edge) for edge in (min(edge for edge in edges if edge > 0.0), max(edges)))
    stride = max(1, math.ceil((high - low) / 4))
    return [2.0**power for power in range(math.ceil(low), math.floor(high) + 1) if power % stride == 0]


def _draw_strip(axes: Any, page: Page, measure: dict[str, Any], strip: dict[str, Any]) -> None:
    for row, arm_row in enumerate(strip["rows"]):
        at, _, marker, _ = _choose_style(page, arm_row["group"])
        if arm_row["low"] is not None:
            axes.hlines(row, arm_row["low"], arm_row["high"], color=at, lw=2, alpha=0.5)
        for late, shape, face in ((False, marker, at), (True, ">", "none")):  # open: it ended before the target
            values = [dot["value"] for dot in arm_row["dots"] if dot["late"] is late]
            axes.plot(values, [row] * len(values), shape, color=at, mfc=face, ms=3.5, alpha=0.7)
        if arm_row["mean"] is not None:
            axes.plot([arm_row["mean"]], [row], "|", color=at, ms=12, mew=2)
    if strip["even"] is not None:
        axes.axvline(strip["even"], color="#7d8590", lw=0.8)
    axes.figure.set_figheight(max(2.5, 1.0 + 0.32 * len(strip["rows"])))
    axes.set_yticks(range(len(strip["rows"])), [textwrap.fill(arm_row["label"], 24) for arm_row in strip["rows"]])
    axes.set_ylim(len(strip["rows"]) - 0.5, -0.5)
    pairs = "" if strip["even"] is None else f"\npaired {'ratio' if strip['ratio'] else 'difference'} to the best, 95 %"
    axes.set_title(textwrap.fill(measure["title"], _TITLE) + pairs)


def _draw_legend(figure: Any, axes: Any) -> None:
    """Draw the legend: a few entries inside the axes, or many below them in a taller figure."""
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= _INSIDE:
        axes.legend()
    elif len(labels) > _INSIDE:
        figure.set_figheight(figure.get_figheight() + 0.17 * len(labels))
        figure.legend(handles, labels, loc="outside lower left")


def _select_shown(page: Page, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the lines of runs on their own rollouts; the page shows other runs on demand."""
    return [line for line in lines if not page.groups[line["g"]].replayed]


def _choose_style(page: Page, group: int) -> tuple[str, Any, str, str]:
    """Choose colour, line style, marker and label of a setting, as on the page."""
    turn = group // len(_COLOURS)
    marker = _MARKERS[(group + turn) % len(_MARKERS)]
    return _COLOURS[group % len(_COLOURS)], _STYLES[turn % len(_STYLES)], marker, page.groups[group].label


def _replace_holes(values: list[float | None]) -> list[float]:
    """Replace holes by NaN, at which matplotlib interrupts a line."""
    return [float("nan") if value is None else value for value in values]


def write_demo_curve(evals: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw exact held-out divergences with the noisy training estimate, and agreement, against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), dpi=120, layout="constrained")
    at = [record["step"] for record in evals]
    left.plot(at, [record["reverse_kl"] for record in evals], "-o", color=BLUE, label="KL(student || teacher)")
    left.plot(at, [record["forward_kl"] for record in evals], "-s", color=ORANGE, label="KL(teacher || student)")
    estimate = [(record["step"], record["kl_k1"]) for record in steps if record.get("kl_k1") is not None]
    if estimate:
        left.plot(*zip(*estimate, strict=True), color=GREY, lw=0.8, alpha=0.6, label="estimate on fresh rollouts (k1)")
    left.set(xlabel="step", ylabel="nats per token", title="held-out divergence (exact, full vocabulary)")
    left.set_ylim(bottom=min([0.0, *(value for _, value in estimate)]))
    left.legend(frameon=False, fontsize=8)
    right.plot(at, [100 * record["agreement"] for record in evals], "-o", color=BLUE)
    right.set(xlabel="step", ylabel="% of positions", title="same most likely next token")
    right.set_ylim(bottom=0.0)
    for axis in (left, right):
        axis.grid(color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)
    return path
