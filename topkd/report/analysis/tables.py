"""Tables of the page: results by setting and by run, results of ``topkd compare``, and settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkd.report.analysis.formatting import (
    NAMES,
    compute_mean,
    format_interval,
    format_number,
    format_percent,
    format_short_count,
)
from topkd.report.analysis.outcome import Outcome, compute_spread, select_counted
from topkd.report.analysis.verdict import ReportVerdict
from topkd.report.load.collection import Collection, RunGroup, find_differing_keys
from topkd.report.load.run_log import flatten_settings

METRICS = {
    "reverse_kl": "KL(S‖T)",
    "forward_kl": "KL(T‖S)",
    "jsd": "JSD",
    "kl_k1": "KL(S‖T), estimate",
    "log_ratio": "log(S/T), replayed",
    "sft_loss": "−log p of the data",
    "agreement": "same top token",
    "accuracy": "accuracy",
}
_TOTALS = {
    "tokens": "tokens",
    "scored_tokens": "teacher tokens",
    "requests": "requests",
    "retries": "retries",
    "cache_hits": "cache hits",
    "seconds": "seconds",
}
_TITLES = {
    "live": "Compared on-policy, live",
    "replay": "Replayed on the reference's rollouts: an off-policy test of the estimators",
}
_COLUMNS = ("arm", "learning rate", "area, share of start", "area ratio", "last value ratio", "tokens to target")
_COSTS = (("teacher_calls", "teacher calls"), ("teacher_tokens", "teacher tokens"), ("teacher_bytes", "teacher bytes"))
# Defaults of settings that are null in the config, because they depend on the kind of run.
_LEFT_OUT = {"learner.lr": "2e-6; 1e-4 if only an adapter is trained"}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; ``numeric`` columns are aligned right, ``marked`` cells (row, column) are highlighted."""

    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    marked: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    title: str = ""


def build_summary_table(
    groups: Sequence[RunGroup], outcomes: Sequence[Sequence[Outcome]], statement: ReportVerdict
) -> Table:
    """Build one row per setting, best first: last values with 95 % intervals, differences to the best, costs."""
    gaps = {rank.group: rank.difference for rank in statement.ranks}
    order = [*gaps, *(index for index in range(len(groups)) if index not in gaps)]
    metrics, sums = _select_columns(outcomes)
    paired = any(gaps.values())
    areas = any(math.isfinite(item.area) for group in outcomes for item in group)
    columns = ["setting", "runs", *metrics.values()]
    columns += ["paired difference to the best"] * paired + [f"mean {statement.metric}"] * areas
    columns += sums.values()
    rows = []
    for index in order:
        ones = outcomes[index]
        meant = select_counted(ones)
        row = [groups[index].label, str(len(ones)) if len(meant) == len(ones) else f"{len(meant)} of {len(ones)}"]
        row += [_format_metric(ones, key) for key in metrics]
        if paired:
            gap = gaps.get(index)
            row.append(format_interval(gap) if gap else "best" if index == order[0] else "—")
        if areas:
            row.append(format_number(compute_mean(item.area for item in meant)))
        row += [_format_total(meant, key) for key in sums]
        rows.append(row)
    note = "Means over seeds with 95 % Student-t intervals in brackets." if any(len(g.runs) > 1 for g in groups) else ""
    return Table(columns, rows, [False, *[True] * (len(columns) - 1)], note=note)


def build_runs_table(groups: Sequence[RunGroup], outcomes: Sequence[Sequence[Outcome]]) -> Table:
    """Build one row per run."""
    metrics, sums = _select_columns(outcomes)
    columns = ["run", "setting", "seed", "state", *metrics.values(), *sums.values()]
    rows = [
        [
            item.run.name,
            group.label,
            "?" if item.run.seed is None else str(item.run.seed),
            item.run.state,
            *(_format_metric([item], key) for key in metrics),
            *(_format_total([item], key) for key in sums),
        ]
        for group, ones in zip(groups, outcomes, strict=True)
        for item in ones
    ]
    return Table(columns, rows, [False, False, True, False, *[True] * (len(columns) - 4)])


def build_settings_table(
    collection: Collection, groups: Sequence[RunGroup], baseline: Mapping[str, Any] | None = None
) -> Table:
    """Build the table of all settings, those that differ first and marked; compare one group with topkd's defaults."""
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


def _select_columns(outcomes: Sequence[Sequence[Outcome]]) -> tuple[dict[str, str], dict[str, str]]:
    """Select the metrics and totals that any run has, with their names."""
    items = [item for group in outcomes for item in group]
    metrics = {key: name for key, name in METRICS.items() if any(key in item.last for item in items)}
    totals = {key: name for key, name in _TOTALS.items() if any(item.totals.get(key) is not None for item in items)}
    return metrics, totals


def build_comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Build a table for each phase that a comparison has, and one for its tuning, if it has one."""
    arms = {arm["name"]: arm for arm in comparison.get("arms") or () if isinstance(arm, dict) and "name" in arm}
    tables = []
    for phase, title in _TITLES.items():
        found = comparison.get(phase)
        if isinstance(found, dict) and (rows := found.get("arms")):
            stated = found.get("verdict") if phase != "live" else None
            statement = " ".join(str(stated[key]) for key in ("text", "ends") if stated.get(key)) if stated else ""
            tables.append(_build_table(comparison, arms, rows, title, statement))
    return [*tables, *_build_tuning_table(comparison, arms)]


def _build_tuning_table(comparison: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Build the table of the learning rates that were tried, and their results."""
    trials = {name: trial for name, trial in (comparison.get("tuning") or {}).items() if isinstance(trial, dict)}
    rates = sorted({rate for trial in trials.values() for rate in trial.get("rates") or ()})
    if not rates:
        return []
    rows: list[list[str]] = []
    marked = set()
    for name, trial in trials.items():
        areas = dict(zip(trial.get("rates") or (), trial.get("areas") or (), strict=False))
        best, edge = trial.get("best"), trial.get("edge")
        shown = {rate: "failed" if area is None else format_number(area) for rate, area in areas.items()}
        cells = [shown.get(rate, "—") for rate in rates]
        taken = f"{format_number(best)}: refused, the {edge}est of the grid" if edge else format_number(best)
        if best in rates:
            marked.add((len(rows), 1 + rates.index(best)))
        rows.append([str(arms.get(name, {}).get("label") or name), *cells, taken])
    columns, title = ["arm", *map(format_number, rates), "chosen"], "Learning rates that were tried"
    note, numeric = _describe_trials(comparison, rates), [False, *[True] * (len(rates) + 1)]
    return [Table(columns, rows, numeric, frozenset(marked), note, title)]


def _describe_trials(comparison: Mapping[str, Any], rates: Sequence[float]) -> str:
    tuned = comparison.get("tuned")
    text = "Mean area of the trials at each rate, on separate seeds and prompts; the rate with the lowest is chosen."
    if not isinstance(tuned, dict):
        return text
    seeds, asked = tuned.get("seeds") or (), tuned.get("rates") or ()
    text += f" Tuning seeds: {', '.join(map(str, seeds))}; equally many trials for every arm."
    if len(asked) < len(rates):
        grid = ", ".join(map(format_number, asked))
        text += f" The grid was {grid}; it was extended where an arm's best rate was the first or the last."
    return text


def _build_table(
    comparison: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    title: str,
    statement: str,
) -> Table:
    reference = arms.get(str(comparison.get("reference")), {}).get("label") or "the first arm"
    costs = [(key, name) for key, name in _COSTS if any(key in fact for row in rows for fact in _list_facts(row))]
    columns = [*_COLUMNS, "tokens ratio", *(name for _, name in costs)]
    cells = []
    for row in rows:
        arm = arms.get(str(row.get("arm")), {})
        ratios = {key: _format_ratio(row, key) for key in ("area_ratio", "final_ratio", "tokens_ratio")}
        if row.get("arm") == comparison.get("reference"):
            ratios = dict.fromkeys(ratios, "reference")
        label, rate = str(arm.get("label") or row.get("arm")), arm.get("lr")
        cells.append([label, "the base's" if rate is None else format_number(rate), _format_spread(row.get("area"))])
        cells[-1] += [ratios["area_ratio"], ratios["final_ratio"], _format_reached(row), ratios["tokens_ratio"]]
        cells[-1] += [format_short_count(compute_mean(_list_costs(row, key))) for key, _ in costs]
    metric = comparison.get("metric")
    note = (
        f"Ratios are to {reference}, paired by seed, with 95 % intervals; below 1 is better. Area: mean of the "
        f"{NAMES.get(str(metric), metric)} over the tokens trained on, as a share of its first value. Target: "
        f"{comparison.get('target', '?')} of the first value; runs that never reach it are counted, not averaged."
    )
    note = f"On replayed rollouts: {statement} {note}" if statement else note
    return Table(columns, cells, [False, *[True] * (len(columns) - 1)], note=note, title=title)


def _list_facts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    seeds = row.get("seeds")
    return [fact for fact in seeds.values() if isinstance(fact, dict)] if isinstance(seeds, dict) else []


def _format_spread(value: Any) -> str:
    if not isinstance(value, dict):
        return "?"
    sd = value.get("sd")
    return format_number(value.get("mean")) + (f" (sd {format_number(sd)})" if sd is not None else "")


def _format_ratio(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, dict) or value.get("ratio") is None:
        return "—"
    text = f"{value['ratio']:.3f}"
    if value.get("low") is not None and value.get("high") is not None:
        text += f" [{value['low']:.3f}, {value['high']:.3f}]"
    pairs, seeds = value.get("pairs"), len(_list_facts(row))
    return f"{text} ({pairs} of {seeds} pairs)" if isinstance(pairs, int) and pairs < seeds else text


def _format_reached(row: Mapping[str, Any]) -> str:
    seeds, censored = len(_list_facts(row)), int(row.get("censored") or 0)
    mean = row.get("tokens_to_target")
    text = format_short_count(mean) if isinstance(mean, int | float) and math.isfinite(mean) else "never"
    return f"{text} ({censored} of {seeds} never)" if censored and text != "never" else text


def _list_costs(row: Mapping[str, Any], key: str) -> list[float]:
    return [fact[key] for fact in _list_facts(row) if isinstance(fact.get(key), int | float)]


def _format_metric(ones: Sequence[Outcome], key: str) -> str:
    say = format_percent if key in ("agreement", "accuracy") else format_number
    return say(ones[0].last.get(key, math.nan)) if len(ones) == 1 else format_interval(compute_spread(ones, key), say)


def _format_total(ones: Sequence[Outcome], key: str) -> str:
    return format_short_count(compute_mean(item.totals.get(key) for item in ones))


def _format_setting(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "—"
    value = _LEFT_OUT.get(key) if config[key] is None else config[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
