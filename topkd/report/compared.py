"""What ``topkd compare`` worked out itself, as tables: areas, ratios to the reference arm, tokens to the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from topkd.report.tables import Table
from topkd.report.wording import number, short

_TITLES = {
    "live": "Compared on-policy, live",
    "replay": "Replayed on the reference's rollouts: an off-policy test of the estimators",
}
_COSTS = (("teacher_calls", "teacher calls"), ("teacher_tokens", "teacher tokens"), ("teacher_bytes", "teacher bytes"))


def compared(comparison: Mapping[str, Any]) -> list[Table]:
    """A table for each phase that a comparison had; what a comparison does not hold is left out."""
    arms = {arm["name"]: arm for arm in comparison.get("arms") or () if isinstance(arm, dict) and "name" in arm}
    tables = []
    for phase, title in _TITLES.items():
        found = comparison.get(phase)
        rows = found.get("arms") if isinstance(found, dict) else None
        if rows:
            tables.append(_table(comparison, arms, rows, title))
    return tables


def _table(
    comparison: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], title: str
) -> Table:
    reference = arms.get(str(comparison.get("reference")), {}).get("label") or "the first arm"
    columns = [
        "arm",
        "learning rate",
        "area, share of start",
        "ratio",
        "last value, ratio",
        "tokens to target",
        "ratio",
    ]
    costs = [(key, name) for key, name in _COSTS if any(key in fact for row in rows for fact in _facts(row))]
    columns += [name for _, name in costs]
    cells = []
    for row in rows:
        arm = arms.get(str(row.get("arm")), {})
        cells.append(
            [
                str(arm.get("label") or row.get("arm")),
                number(arm.get("lr")) if arm.get("lr") is not None else "the base's",
                _spread(row.get("area")),
                _ratio(row.get("area_ratio")),
                _ratio(row.get("final_ratio")),
                _reached(row),
                _ratio(row.get("tokens_ratio")),
                *(_mean_cost(row, key) for key, _ in costs),
            ]
        )
    note = (
        f"Ratios are to {reference}, paired by seed, with 95 % intervals; below 1 is better. Area: mean of the "
        f"{comparison.get('metric', 'metric')} over the tokens trained on, as a share of its first value. Target: "
        f"{comparison.get('target', '?')} of the first value; runs that never get there are counted, not averaged."
    )
    return Table(columns, cells, [False, *[True] * (len(columns) - 1)], note=note, title=title)


def _facts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    seeds = row.get("seeds")
    return [fact for fact in seeds.values() if isinstance(fact, dict)] if isinstance(seeds, dict) else []


def _spread(value: Any) -> str:
    if not isinstance(value, dict):
        return "?"
    sd = value.get("sd")
    return number(value.get("mean")) + (f" (sd {number(sd)})" if sd is not None else "")


def _ratio(value: Any) -> str:
    if not isinstance(value, dict) or value.get("ratio") is None:
        return "—"
    text = f"{value['ratio']:.3f}"
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{value['low']:.3f}, {value['high']:.3f}]"


def _reached(row: Mapping[str, Any]) -> str:
    seeds, censored = len(_facts(row)), int(row.get("censored") or 0)
    mean = row.get("tokens_to_target")
    text = short(mean) if isinstance(mean, int | float) and math.isfinite(mean) else "never"
    return f"{text} ({censored} of {seeds} never)" if censored and text != "never" else text


def _mean_cost(row: Mapping[str, Any], key: str) -> str:
    known = [fact[key] for fact in _facts(row) if isinstance(fact.get(key), int | float)]
    return short(sum(known) / len(known)) if known else "?"
