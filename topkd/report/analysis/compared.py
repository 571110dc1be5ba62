"""What ``topkd compare`` worked out itself, as tables: areas, ratios to the reference arm, tokens to the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from topkd.report.analysis.formatting import NAMES, format_number, format_short_count
from topkd.report.analysis.tables import Table

_TITLES = {
    "live": "Compared on-policy, live",
    "replay": "Replayed on the reference's rollouts: an off-policy test of the estimators",
}
_COSTS = (("teacher_calls", "teacher calls"), ("teacher_tokens", "teacher tokens"), ("teacher_bytes", "teacher bytes"))


def build_comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Build a table for each phase of a comparison and one of its tuning; leave out what it does not have."""
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
        cells = [
            "—" if rate not in areas else "broke" if areas[rate] is None else format_number(areas[rate])
            for rate in rates
        ]
        taken = f"{format_number(best)}: the grid's {edge}est, refused" if edge else format_number(best)
        if best in rates:
            marked.add((len(rows), 1 + rates.index(best)))
        rows.append([str(arms.get(name, {}).get("label") or name), *cells, taken])
    columns = ["arm", *map(format_number, rates), "taken"]
    numeric = [False, *[True] * (len(rates) + 1)]
    return [
        Table(
            columns,
            rows,
            numeric,
            frozenset(marked),
            _describe_trials(comparison, rates),
            "Learning rates that were tried",
        )
    ]


def _describe_trials(comparison: Mapping[str, Any], rates: Sequence[float]) -> str:
    tuned = comparison.get("tuned")
    text = "Mean area of the trials at each rate, on seeds and prompts of their own; the lowest is taken."
    if not isinstance(tuned, dict):
        return text
    seeds, asked = tuned.get("seeds") or (), tuned.get("rates") or ()
    text += f" Tuning seeds: {', '.join(map(str, seeds))}; as many trials for every arm."
    if len(asked) < len(rates):
        grid = ", ".join(map(format_number, asked))
        text += f" The grid was {grid}, and grew where the best rate of an arm was at its edge."
    return text


def _build_table(
    comparison: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    title: str,
    statement: str,
) -> Table:
    reference = arms.get(str(comparison.get("reference")), {}).get("label") or "the first arm"
    columns = [
        "arm",
        "learning rate",
        "area, share of start",
        "area ratio",
        "last value ratio",
        "tokens to target",
        "tokens ratio",
    ]
    costs = [(key, name) for key, name in _COSTS if any(key in fact for row in rows for fact in _list_facts(row))]
    columns += [name for _, name in costs]
    cells = []
    for row in rows:
        arm = arms.get(str(row.get("arm")), {})
        first = row.get("arm") == comparison.get("reference")
        cells.append(
            [
                str(arm.get("label") or row.get("arm")),
                format_number(arm.get("lr")) if arm.get("lr") is not None else "the base's",
                _format_spread(row.get("area")),
                "reference" if first else _format_ratio(row, "area_ratio"),
                "reference" if first else _format_ratio(row, "final_ratio"),
                _format_reached(row),
                "reference" if first else _format_ratio(row, "tokens_ratio"),
                *(_compute_mean_cost(row, key) for key, _ in costs),
            ]
        )
    metric = comparison.get("metric")
    note = (
        f"Ratios are to {reference}, paired by seed, with 95 % intervals; below 1 is better. Area: mean of the "
        f"{NAMES.get(str(metric), metric)} over the tokens trained on, as a share of its first value. Target: "
        f"{comparison.get('target', '?')} of the first value; runs that never get there are counted, not averaged."
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


def _compute_mean_cost(row: Mapping[str, Any], key: str) -> str:
    known = [fact[key] for fact in _list_facts(row) if isinstance(fact.get(key), int | float)]
    return format_short_count(sum(known) / len(known)) if known else "?"
