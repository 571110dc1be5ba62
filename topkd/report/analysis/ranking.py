"""Settings from best to worst, each with its seeds' values and its paired difference to the best."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from topkd.report.analysis.intervals import Interval, subtract_paired
from topkd.report.analysis.outcome import SAMPLED, Metric, Outcome, collect_last_by_seed, compute_spread, is_counted
from topkd.report.load.collection import RunGroup


@dataclass(frozen=True, slots=True)
class Rank:
    """One setting: ``difference`` is to the best one, over the seeds that both have; None for fewer than two.

    A ``control`` is a comparison's yardstick: it stands behind the others, whatever it came to.
    """

    group: int
    label: str
    end: Interval
    values: list[dict[str, Any]]
    difference: Interval | None = None
    control: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON types."""
        gap = None if self.difference is None else asdict(self.difference)
        values = {key: value if math.isfinite(value) else None for key, value in asdict(self.end).items()}
        return {"group": self.group, "label": self.label, **values, "values": self.values, "difference": gap}


def rank_groups(
    groups: Sequence[RunGroup],
    outcomes: Sequence[Sequence[Outcome]],
    metric: Metric,
    controls: Container[str] = (),
) -> list[Rank]:
    """Rank the settings that were run on-policy, best first; replays of other runs' rollouts are not ranked.

    Nor is, by an estimate from rollouts, what trained on completions that the student did not draw.
    """
    rows = [
        Rank(
            index,
            group.label,
            compute_spread(ones, metric.key),
            _find_values(ones, metric.key),
            control=group.runs[0].params.get("arm") in controls,
        )
        for index, (group, ones) in enumerate(zip(groups, outcomes, strict=True))
        if not group.replayed and not (metric is SAMPLED and group.foreign)
    ]
    rows.sort(key=lambda row: (row.control, row.end.mean if math.isfinite(row.end.mean) else math.inf))
    if not rows:
        return []
    best = collect_last_by_seed(outcomes[rows[0].group], metric.key)
    return [rows[0], *(_compare_with(row, outcomes[row.group], best, metric) for row in rows[1:])]


def _compare_with(row: Rank, ones: Sequence[Outcome], best: dict[int, float], metric: Metric) -> Rank:
    gap = subtract_paired(collect_last_by_seed(ones, metric.key), best)
    return replace(row, difference=gap if gap.n >= 2 else None)


def _find_values(ones: Sequence[Outcome], key: str) -> list[dict[str, Any]]:
    return [
        {"seed": item.run.seed, "run": item.run.name, "value": item.last[key]}
        for item in ones
        if key in item.last and is_counted(item.run)
    ]
