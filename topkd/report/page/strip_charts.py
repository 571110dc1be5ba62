"""Strip charts: one dot per seed, means with intervals, and the paired values on which the verdict is based."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkd.report.analysis.formatting import format_number, format_short_count
from topkd.report.analysis.intervals import Interval, compute_interval
from topkd.report.analysis.outcome import Rank
from topkd.report.load.collection import Collection, RunGroup

_DOTS = "A dot is a seed; the bar is the mean with its 95 % interval over seeds."


@dataclass(frozen=True, slots=True)
class Dot:
    """One seed. ``late``: the run ended before it reached the target; the value is then where it ended."""

    seed: int | None
    value: float
    late: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: its seeds, their mean with a 95 % interval (None: there is none), and the text beside it."""

    group: int
    label: str
    dots: list[Dot]
    mean: float | None
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows over one axis. ``even`` is the value at which two settings are equal; the axis of ratios is logarithmic."""

    note: str
    rows: list[Row]
    even: float | None = None
    ratio: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to judge settings: its values, and the paired values of each setting and the best one."""

    key: str
    title: str
    strips: list[Strip]


def list_measures(
    collection: Collection, groups: Sequence[RunGroup], ranks: Sequence[Rank], metric: str
) -> list[Measure]:
    """List area and tokens to the target of a comparison, then the last values; nothing for a single run."""
    found = [*_compare_arms(collection.comparison, groups, metric), *_measure_last(ranks, metric)]
    return [point for point in found if sum(len(row.dots) for row in point.strips[0].rows) > 1]


def _measure_last(ranks: Sequence[Rank], metric: str) -> list[Measure]:
    known = [rank for rank in ranks if rank.values]
    if not known:
        return []
    seeds = {rank.group: [Dot(point["seed"], point["value"]) for point in rank.values] for rank in known}
    rows = [_build_row(rank, seeds[rank.group], rank.end) for rank in known]
    best = {dot.seed: dot.value for dot in seeds[known[0].group] if dot.seed is not None}
    gaps = [
        _build_row(
            rank,
            [Dot(dot.seed, dot.value - best[dot.seed]) for dot in seeds[rank.group] if dot.seed in best],
            rank.difference,
            ("+" if rank.difference.mean > 0 else "") + format_number(rank.difference.mean),
        )
        for rank in known[1:]
        if rank.difference is not None
    ]
    strips = [Strip(f"Nats a token. {_DOTS}", rows)]
    if gaps:
        note = f"Difference to {known[0].label} on the same seed. Right of zero: it ends higher."
        strips.append(Strip(note, gaps, even=0.0))
    return [Measure("last", f"Last {metric}", strips)]


def _build_row(setting: Rank | _Arm, dots: list[Dot], spread: Interval, text: str = "") -> Row:
    ends = (_known(spread.mean), _known(spread.low), _known(spread.high))
    return Row(setting.group, setting.label, dots, *ends, text or format_number(spread.mean))


@dataclass(frozen=True, slots=True)
class _Arm:
    """An arm of a comparison: its colour, its name, and the results of its seeds."""

    group: int
    label: str
    seeds: dict[int, Mapping[str, Any]]
    control: bool = False

    def values(self, key: str) -> dict[int, float]:
        """Return the value of each seed that has one."""
        return {s: fact[key] for s, fact in self.seeds.items() if _number(fact.get(key))}


def _compare_arms(comparison: Mapping[str, Any], groups: Sequence[RunGroup], metric: str) -> list[Measure]:
    arms = _read_arms(comparison, groups)
    areas = (arm for arm in arms if arm.values("area"))
    by_area = sorted(areas, key=lambda arm: (arm.control, _mean(arm.values("area").values())))
    rest = [arm for arm in arms if arm not in by_area]
    # Arms with equal speed keep the order of their areas.
    by_tokens = sorted(filter(_find_arrivals, [*by_area, *rest]), key=_rank_speed)
    found = []
    if by_area:
        note = f"Mean over the tokens trained on, as a share of the first value; 1 means no progress. {_DOTS}"
        seeds = [(arm, arm.values("area")) for arm in by_area]
        rows = [
            _build_row(arm, [Dot(*pair) for pair in v.items()], compute_interval([*v.values()])) for arm, v in seeds
        ]
        ratios = _build_ratio_strip(by_area, "area", "area")
        found.append(Measure("area", f"Area under {metric}", [Strip(note, rows), *ratios]))
    if by_tokens:
        title = f"Tokens until {metric} is {comparison.get('target', '?')} of its first value"
        note = "A dot is a seed. An open triangle is a run that ended too early; a row with one has no mean."
        rows = [_find_arrival(arm) for arm in by_tokens]
        ratios = _build_ratio_strip(by_tokens, "tokens_to_target", "tokens")
        found.append(Measure("tokens", title, [Strip(note, rows), *ratios]))
    return found


def _read_arms(comparison: Mapping[str, Any], groups: Sequence[RunGroup]) -> list[_Arm]:
    live = comparison.get("live")
    stated_arms = {arm.get("name"): arm for arm in comparison.get("arms") or () if isinstance(arm, dict)}
    indices = {group.runs[0].params.get("arm"): index for index, group in enumerate(groups) if not group.replayed}
    found = []
    for row in (live.get("arms") if isinstance(live, dict) else None) or ():
        arm = stated_arms.get(row.get("arm"), {})
        label = str(arm.get("label") or row.get("arm"))
        if label in indices and isinstance(row.get("seeds"), dict):
            seeds = {int(seed): fact for seed, fact in row["seeds"].items()}
            found.append(_Arm(indices[label], label, seeds, control=bool(arm.get("control"))))
    return found


def _find_arrivals(arm: _Arm) -> list[Dot]:
    """Find the tokens at which each seed reached the target, or ended without it."""
    dots = []
    for seed, fact in arm.seeds.items():
        late = not _number(fact.get("tokens_to_target"))
        value = fact.get("tokens" if late else "tokens_to_target")
        if isinstance(value, int | float):
            dots.append(Dot(seed, value, late))
    return dots


def _find_arrival(arm: _Arm) -> Row:
    dots = _find_arrivals(arm)
    late = sum(dot.late for dot in dots)
    if late:
        return Row(arm.group, arm.label, dots, None, None, None, f"{late} of {len(dots)} never")
    spread = compute_interval([dot.value for dot in dots])
    return _build_row(arm, dots, spread, format_short_count(spread.mean))


def _rank_speed(arm: _Arm) -> tuple[bool, int, float]:
    dots = _find_arrivals(arm)
    return arm.control, sum(dot.late for dot in dots), _mean([dot.value for dot in dots])


def _build_ratio_strip(arms: Sequence[_Arm], key: str, what: str) -> list[Strip]:
    """Divide the first arm's value by each other arm's, seed by seed; the interval is that of the mean log-ratio."""
    best, *others = arms
    mine = best.values(key)
    rows = []
    for arm in others:
        arm_values = arm.values(key)
        logs = {s: math.log(mine[s] / arm_values[s]) for s in mine if mine[s] > 0 and arm_values.get(s, 0) > 0}
        if not logs:
            continue
        spread = compute_interval([*logs.values()])
        mean, low, high = (
            _known(math.exp(end)) if math.isfinite(end) else None for end in (spread.mean, spread.low, spread.high)
        )
        pairs = max(len(best.seeds), len(arm.seeds))
        text = f"{math.exp(spread.mean):.3f}" + (f" ({spread.n} of {pairs} pairs)" if spread.n < pairs else "")
        dots = [Dot(seed, math.exp(log)) for seed, log in logs.items()]
        rows.append(Row(arm.group, f"against {arm.label}", dots, mean, low, high, text))
    if not rows:
        return []
    note = f"{best.label}'s {what} divided by each other arm's on the same seed, with the 95 % interval."
    return [Strip(f"{note} Left of 1: {best.label} is better.", rows, even=1.0, ratio=True)]


def _mean(values: Iterable[float]) -> float:
    known = [*values]
    return sum(known) / len(known)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
