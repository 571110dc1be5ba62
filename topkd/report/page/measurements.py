"""Tables of measurements: divergences on every kind of prefixes, and figures of the training itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from topkd.report.analysis.formatting import format_interval, format_number, format_percent
from topkd.report.analysis.intervals import compute_interval
from topkd.report.analysis.outcome import EVALUATED, SHARES, is_counted
from topkd.report.analysis.tables import METRICS, Table
from topkd.report.load.collection import RunGroup
from topkd.report.load.columns import Floats, list_prefix_kinds, make_eval_source, read_column
from topkd.report.load.run_log import LoggedRun
from topkd.report.page.panels import SECTIONS

_PREFIXES: Final = {
    "fixed": "fixed: written by the untrained student",
    "fresh": "fresh: written by the student",
    "teacher": "written by the teacher",
}
_PANELS: Final = {panel.key: panel for section in SECTIONS for panel in section.panels}


def list_by_prefixes(groups: Sequence[RunGroup], order: Sequence[int]) -> Table | None:
    """List last values on each kind of prefixes, setting by setting; None if only one kind was measured."""
    kinds = list_prefix_kinds(groups)
    if len(kinds) < 2:
        return None
    table = [
        ([_PREFIXES.get(kind, kind), group.label], {key: _format_last(group, kind, key) for key in EVALUATED})
        for kind in kinds
        for group in (groups[index] for index in order)
    ]
    kept = [key for key in EVALUATED if any(cells[key] for _, cells in table)]
    columns = ["prefixes", "setting", *(METRICS[key] for key in kept)]
    rows = [[*names, *(cells[key] or "—" for key in kept)] for names, cells in table if any(cells.values())]
    note = "Values of the last evaluation: means over seeds, with 95 % intervals in brackets if there are several."
    return Table(columns, rows, [False, False, *[True] * len(kept)], note=note, title="On each kind of prefixes")


def list_training(groups: Sequence[RunGroup], order: Sequence[int]) -> Table | None:
    """List tokens per step, clipped ratios, and first and last lengths and truncation; None without steps."""
    table = [
        (groups[index].label, {name: write(runs) for name, write in _CELLS.items()})
        for index in order
        if (runs := [run for run in _select_counted(groups[index]) if run.steps])
    ]
    kept = [name for name in _CELLS if any(cells[name] != "—" for _, cells in table)]
    if not kept:
        return None
    columns, rows = ["setting", *kept], [[label, *(cells[name] for name in kept)] for label, cells in table]
    note = "Means over steps and seeds. With an arrow: means over the first and over the last tenth of the steps."
    return Table(columns, rows, [False, *[True] * len(kept)], note=note, title="How training went")


def _select_counted(group: RunGroup) -> list[LoggedRun]:
    return [run for run in group.runs if is_counted(run) or len(group.runs) == 1]


def _format_last(group: RunGroup, kind: str, key: str) -> str:
    values = []
    for run in _select_counted(group):
        known = read_column(make_eval_source(run, kind).records, key)
        known = known[np.isfinite(known)]
        values += known[-1:].tolist()
    if not values:
        return ""
    interval = compute_interval(values)
    return format_interval(interval.within_shares(), format_percent) if key in SHARES else format_interval(interval)


def _format_tokens(runs: Sequence[LoggedRun]) -> str:
    """Format the number of tokens per step: one number if all steps of all runs have the same."""
    every = np.concatenate([read_column(run.steps, "tokens") for run in runs])
    every = every[np.isfinite(every)]
    if not every.size:
        return "—"
    low, high = every.min(), every.max()
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _format_mean(key: str, unit: str = "") -> Callable[[Sequence[LoggedRun]], str]:
    def write(runs: Sequence[LoggedRun]) -> str:
        means = [known.mean() for run in runs if (known := _read_known(run, key)).size]
        return f"{format_number(float(np.mean(means)))}{unit}" if means else "—"

    return write


def _format_drift(key: str, unit: str = "") -> Callable[[Sequence[LoggedRun]], str]:
    def write(runs: Sequence[LoggedRun]) -> str:
        known = [values for run in runs if (values := _read_known(run, key)).size]
        if not known:
            return "—"
        tenth = [max(1, values.size // 10) for values in known]
        first = float(np.mean([values[:n].mean() for values, n in zip(known, tenth, strict=True)]))
        last = float(np.mean([values[-n:].mean() for values, n in zip(known, tenth, strict=True)]))
        return f"{format_number(first)} → {format_number(last)}{unit}"

    return write


def _read_known(run: LoggedRun, key: str) -> Floats:
    values = _PANELS[key].values(run.steps)
    return np.empty(0) if values is None else values[np.isfinite(values)]


_CELLS: Final[dict[str, Callable[[Sequence[LoggedRun]], str]]] = {
    "tokens per step": _format_tokens,
    "ratios clipped": _format_mean("clip_fraction", " %"),
    "effective sample size": _format_mean("ess", " %"),
    "effective coefficient": _format_mean("effective_coefficient"),
    "completion length": _format_drift("length"),
    "cut at the limit": _format_drift("truncation", " %"),
    "probability of ending, per token": _format_drift("eos", " %"),
}
