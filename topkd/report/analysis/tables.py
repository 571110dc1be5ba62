"""Tables of the page: what came out, setting by setting, and what went in, with what differs marked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkd.report.analysis.formatting import format_interval, format_number, format_percent, format_short_count
from topkd.report.analysis.outcome import Outcome, compute_spread, select_counted
from topkd.report.analysis.verdict import ReportVerdict
from topkd.report.load.collection import Collection, RunGroup, find_differing_keys
from topkd.report.load.run_log import flatten_settings

_METRICS = (
    ("reverse_kl", "KL(S‖T)"),
    ("forward_kl", "KL(T‖S)"),
    ("jsd", "JSD"),
    ("kl_k1", "KL(S‖T), estimate"),
    ("log_ratio", "log(S/T), replayed"),
    ("sft_loss", "−log p of the data"),
    ("agreement", "same top token"),
    ("accuracy", "accuracy"),
)
_TOTALS = (
    ("tokens", "tokens"),
    ("scored_tokens", "teacher tokens"),
    ("requests", "requests"),
    ("retries", "retries"),
    ("cache_hits", "cache hits"),
    ("seconds", "seconds"),
)
# What a setting is that was left to the kind of run: the configuration has null.
_LEFT_OUT = {"learner.lr": "2e-6; 1e-4 where only an adapter trains"}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; ``numeric`` columns stand to the right, ``marked`` cells differ (row, column)."""

    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    marked: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    title: str = ""


def build_summary_table(
    groups: Sequence[RunGroup], outcomes: Sequence[Sequence[Outcome]], statement: ReportVerdict
) -> Table:
    """Build a row a setting, best first: last values with 95 % intervals over seeds, differences to the best, cost."""
    gaps = {rank.group: rank.difference for rank in statement.ranks}
    order = [*gaps, *(index for index in range(len(groups)) if index not in gaps)]
    flatly = [item for group in outcomes for item in group]
    metrics = [(key, name) for key, name in _METRICS if any(key in item.last for item in flatly)]
    sums = [(key, name) for key, name in _TOTALS if any(item.totals.get(key) is not None for item in flatly)]
    paired = any(gaps.values())
    areas = any(math.isfinite(item.area) for item in flatly)
    columns = ["setting", "runs", *(name for _, name in metrics)]
    columns += ["paired difference to the best"] * paired + [f"mean {statement.metric}"] * areas
    columns += [name for _, name in sums]
    rows = []
    for index in order:
        ones = outcomes[index]
        meant = select_counted(ones)
        row = [groups[index].label, str(len(ones)) if len(meant) == len(ones) else f"{len(meant)} of {len(ones)}"]
        row += [_format_metric(ones, key) for key, _ in metrics]
        if paired:
            gap = gaps.get(index)
            row.append(format_interval(gap) if gap else "best" if index == order[0] else "—")
        if areas:
            row.append(format_number(_compute_mean([item.area for item in meant])))
        row += [_format_total(meant, key) for key, _ in sums]
        rows.append(row)
    note = "Means over seeds with 95 % Student-t intervals in brackets." if any(len(g.runs) > 1 for g in groups) else ""
    return Table(columns, rows, [False, *[True] * (len(columns) - 1)], note=note)


def build_runs_table(groups: Sequence[RunGroup], outcomes: Sequence[Sequence[Outcome]]) -> Table:
    """Build a row a run."""
    flatly = [(group, item) for group, ones in zip(groups, outcomes, strict=True) for item in ones]
    metrics = [(key, name) for key, name in _METRICS if any(key in item.last for _, item in flatly)]
    sums = [(key, name) for key, name in _TOTALS if any(item.totals.get(key) is not None for _, item in flatly)]
    columns = ["run", "setting", "seed", "state", *(name for _, name in metrics), *(name for _, name in sums)]
    rows = [
        [
            item.run.name,
            group.label,
            "?" if item.run.seed is None else str(item.run.seed),
            item.run.state,
            *(_format_metric([item], key) for key, _ in metrics),
            *(_format_total([item], key) for key, _ in sums),
        ]
        for group, item in flatly
    ]
    return Table(columns, rows, [False, False, True, False, *[True] * (len(columns) - 4)])


def build_settings_table(
    collection: Collection, groups: Sequence[RunGroup], baseline: Mapping[str, Any] | None = None
) -> Table:
    """Build the table of all settings, differing ones first and marked; of one group, against topkd's defaults."""
    configs = [{**flatten_settings(group.runs[0].config), **group.runs[0].params} for group in groups]
    for config in configs:
        config.pop("seed", None)
    columns = ["setting", *(group.label for group in groups)]
    if len(groups) == 1 and baseline is not None:
        defaults = {key: value for key, value in flatten_settings(baseline).items() if key in configs[0]}
        configs, columns = [configs[0], defaults], ["setting", "this run", "topkd's default"]
        known = [key for key in configs[0] if key in defaults]
        differ = [key for key in known if configs[0][key] != defaults[key]]
    else:
        differ = find_differing_keys(configs)
    keys = [*differ, *(key for config in configs for key in config)]
    rows, marked = [], set()
    for key in dict.fromkeys(keys):
        rows.append([key, *(_format_setting(config, key) for config in configs)])
        if key in differ:
            marked |= {(len(rows) - 1, column) for column in range(len(columns))}
    seeds = sorted({run.seed for run in collection.runs if run.seed is not None})
    note = f"Seeds: {', '.join(map(str, seeds))}." if seeds else ""
    return Table(columns, rows, [False] * len(columns), frozenset(marked), note)


def _format_metric(ones: Sequence[Outcome], key: str) -> str:
    say = format_percent if key in ("agreement", "accuracy") else format_number
    return say(ones[0].last.get(key, math.nan)) if len(ones) == 1 else format_interval(compute_spread(ones, key), say)


def _format_total(ones: Sequence[Outcome], key: str) -> str:
    known = [value for item in ones if (value := item.totals.get(key)) is not None]
    return format_short_count(sum(known) / len(known)) if known else "?"


def _compute_mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _format_setting(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "—"
    value = _LEFT_OUT.get(key) if config[key] is None else config[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
