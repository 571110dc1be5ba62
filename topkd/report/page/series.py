"""Turns columns into plotted series: one line per group, short enough for a page; down-sampling is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from topkd.report.load.collection import RunGroup
from topkd.report.load.columns import FIXED, Floats, Source, make_eval_source, make_step_source
from topkd.report.page import downsampling
from topkd.report.page.panels import Panel

POINTS = 400  # largest number of points of a line, which is rarely wider than this in pixels
SMOOTH_POINTS = 160


@dataclass(slots=True)
class Downsampling:
    """Counts of the down-sampling on a page."""

    longest: int = 0
    windows: set[int] = field(default_factory=set)
    series: int = 0

    def describe(self) -> str:
        """Describe the down-sampling in words; "" if every value is drawn."""
        if not self.series:
            return ""
        return (
            f"Down-sampled: if a series has more than {POINTS} values (the longest has {self.longest:,}), "
            f"the lowest and the highest value of each of {(POINTS - 2) // 2} equal stretches are drawn, so that no "
            "extreme is lost. The run log has every value."
        )


def build_panel_series(
    panel: Panel, groups: Sequence[RunGroup], downsampled: Downsampling, prefixes: str = FIXED
) -> list[dict[str, Any]]:
    """Build the lines of one panel.

    A group of one run has a line of its values, and one of their rolling mean if they are noisy. A group of several
    runs has a line of the mean over seeds, with each seed (evaluations) or the range of rolling means (steps) around.
    """
    lines: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        sources = [
            make_step_source(run) if panel.source == "step" else make_eval_source(run, prefixes) for run in group.runs
        ]
        drawn = [(source, values) for source in sources if (values := panel.values(source.records)) is not None]
        if not drawn:
            continue
        if len(drawn) == 1:
            lines += _draw_single(index, *drawn[0], panel, downsampled)
        else:
            lines += _draw_several(index, drawn, panel)
    return lines


def _draw_single(
    index: int, source: Source, values: Floats, panel: Panel, downsampled: Downsampling
) -> list[dict[str, Any]]:
    rows = downsampling.keep_extremes(values, POINTS)
    if rows.size < values.size:
        downsampled.series += 1
        downsampled.longest = max(downsampled.longest, values.size)
    window = panel.window(values.size)
    if window <= 1:
        return [_build_line(index, "main", source.axes, values, rows)]
    smooth = panel.smoothed(source.records, values, window)
    main = _build_line(index, "main", source.axes, smooth, downsampling.keep_evenly(values.size, SMOOTH_POINTS))
    if panel.over is not None:  # ratios of single steps would hide the ratio of means
        return [main]
    downsampled.windows.add(window)
    return [_build_line(index, "raw", source.axes, values, rows), main]


def _draw_several(index: int, drawn: list[tuple[Source, Floats]], panel: Panel) -> list[dict[str, Any]]:
    """Build the line of means over seeds, which ends where the shortest run ends, and the seeds around it."""
    steps = _find_common_steps([source for source, _ in drawn])
    if not steps.size:
        return []
    window = panel.window(steps.size)
    stacked, axes = [], []
    for source, values in drawn:
        at = np.searchsorted(source.axes["step"], steps)
        records = [source.records[index] for index in at.tolist()]
        stacked.append(panel.smoothed(records, values[at], window))
        axes.append({key: axis[at] for key, axis in source.axes.items()})
    table = np.stack(stacked)
    shared = [key for key in axes[0] if all(key in run_axes for run_axes in axes)]
    mean_axes = {key: np.mean([run_axes[key] for run_axes in axes], axis=0) for key in shared}
    rows = downsampling.keep_evenly(steps.size, SMOOTH_POINTS)
    main = _build_line(index, "main", mean_axes, table.mean(axis=0), rows) | {"n": len(drawn)}
    if panel.source == "step":
        return [main | {"lo": _round_digits(table.min(axis=0)[rows]), "hi": _round_digits(table.max(axis=0)[rows])}]
    seeds = [
        _build_line(index, "seed", source.axes, values, downsampling.keep_extremes(values, SMOOTH_POINTS))
        | {"name": source.run.name}
        for source, values in drawn
    ]
    return [*seeds, main]


def _find_common_steps(sources: list[Source]) -> Floats:
    steps: Floats = reduce(np.intersect1d, [source.axes["step"] for source in sources])
    return steps[np.isfinite(steps)]


def _build_line(
    index: int, role: str, axes: dict[str, Floats], values: Floats, rows: downsampling.Rows
) -> dict[str, Any]:
    return {
        "g": index,
        "role": role,
        "x": {key: _round_digits(axis[rows], 7) for key, axis in axes.items()},
        "y": _round_digits(values[rows]),
    }


def build_ratio_histogram(groups: Sequence[RunGroup]) -> dict[str, Any] | None:
    """Build the histogram of importance ratios over all steps of each group, in the run log's own bins."""
    edges: list[float] | None = None
    lines = []
    for index, group in enumerate(groups):
        counts: Floats | None = None
        for record in (record for run in group.runs for record in run.steps):
            found, at = record.get("ratio_hist"), record.get("ratio_hist_edges")
            if not isinstance(found, list) or not isinstance(at, list) or not found:
                continue
            edges = edges or at
            if at != edges or abs(len(at) - len(found)) > 1:  # counts in different bins cannot be added
                continue
            counts = np.asarray(found, dtype=np.float64) + (0.0 if counts is None else counts)
        if counts is not None and counts.sum() > 0:
            lines.append({"g": index, "y": _round_digits(counts / counts.sum()), "n": int(counts.sum())})
    return {"edges": edges, "lines": lines} if lines else None


def _round_digits(values: Floats, digits: int = 5) -> list[float | int | None]:
    """Round to ``digits`` significant digits, as plain numbers; a hole becomes None."""
    out: list[float | int | None] = []
    for value in values.tolist():
        if not np.isfinite(value):
            out.append(None)
            continue
        number = float(f"{value:.{digits}g}")
        out.append(int(number) if number.is_integer() and abs(number) < 1e15 else number)
    return out
