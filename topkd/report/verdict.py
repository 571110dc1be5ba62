"""The page's first lines: which setting won, by how much, and what to be careful about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from topkd.report.collection import Collection, Group
from topkd.report.diary import last_step
from topkd.report.intervals import Interval, paired
from topkd.report.outcome import Metric, Outcome, by_seed, counts, main_metric, outcome, spread, warnings_of

ENOUGH_SEEDS = 8


@dataclass(slots=True)
class Verdict:
    """What stands at the top.

    Attributes:
        headline: The result in one sentence.
        detail: How sure it is, in one sentence.
        tone: "won", "open" (no clear winner), "one" (a single setting) or "waiting".
        facts: Figures beside it: label, value, remark.
        warnings: What a careful reader would ask about.
        stated: What the comparison that made the runs says itself.
        ranks: Settings from best to worst, with each seed's value and the paired difference to the best.
        metric: What is compared.
    """

    headline: str
    detail: str = ""
    tone: str = "one"
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stated: str = ""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    metric: str = ""


def verdict(collection: Collection, groups: Sequence[Group]) -> tuple[Verdict, list[list[Outcome]]]:
    """The verdict over the groups, and the outcomes it rests on, group by group."""
    metric = main_metric(groups)
    if metric is None:
        return Verdict("Waiting for the first step.", tone="waiting"), [[] for _ in groups]
    outcomes = [[outcome(run, metric) for run in group.runs] for group in groups]
    if len(groups) == 1:
        said = _one_run(outcomes[0][0], metric) if len(outcomes[0]) == 1 else _one_group(groups[0], outcomes[0], metric)
    else:
        said = _several(groups, outcomes, metric)
    said.metric = metric.name
    said.stated = _stated(collection.comparison)
    several = len(collection.runs) > 1
    for one in (one for group in outcomes for one in group):
        said.warnings += [f"{one.run.name}: {text}" if several else text for text in warnings_of(one.run, one)]
    if not metric.exact:
        said.warnings.insert(0, "no exact held-out KL in the diary: the verdict rests on the estimate from rollouts")
    said.warnings += collection.notes
    return said, outcomes


def _one_run(one: Outcome, metric: Metric) -> Verdict:
    first, last = one.first.get(metric.key, math.nan), one.last.get(metric.key, math.nan)
    steps = last_step(one.run.steps)
    way = "fell" if last < first else "rose" if last > first else "stayed"
    where = "on held-out prefixes, exact over the whole vocabulary" if metric.exact else "on its own rollouts"
    said = Verdict(
        f"{metric.name} {way} from {number(first)} to {number(last)} nats a token ({change(first, last)})",
        f"{where}; {steps:,} of {one.run.planned or steps:,} steps, {one.run.state}.".capitalize(),
    )
    said.facts = _facts(one)
    return said


def _one_group(group: Group, outcomes: Sequence[Outcome], metric: Metric) -> Verdict:
    end = spread(outcomes, metric.key)
    start = [one.first[metric.key] for one in outcomes if metric.key in one.first]
    first = sum(start) / len(start) if start else math.nan
    return Verdict(
        f"{metric.name} went from {number(first)} to {between(end)} nats a token ({change(first, end.mean)})",
        f"Mean over {end.n} runs of {group.label} that differ in their seed, with the 95 % interval over them.",
        facts=_mean_facts(outcomes),
        ranks=_ranks([group], [list(outcomes)], metric),
    )


def _several(groups: Sequence[Group], outcomes: list[list[Outcome]], metric: Metric) -> Verdict:
    ranks = _ranks(groups, outcomes, metric)
    comparable = [rank for rank in ranks if rank["mean"] is not None]
    if len(comparable) < 2:
        return Verdict("No two settings have finished runs to compare.", tone="open", ranks=ranks)
    best, second = comparable[0], comparable[1]
    gap = second["difference"]
    said = Verdict("", ranks=ranks, facts=_mean_facts(outcomes[best["group"]], f"{best['label']}, mean"))
    ahead = f"{best['label']} ends at {number(best['mean'])} nats a token, {second['label']} at {number(second['mean'])}"
    if gap is None:
        said.headline, said.tone = f"{best['label']} has the lower {metric.name}, but nothing says how surely", "open"
        said.detail = f"{ahead}. Fewer than two seeds in common: no paired interval, so take it as one draw."
    elif gap["low"] > 0.0:
        said.headline, said.tone = f"{best['label']} wins: {metric.name} lower by {number(gap['mean'])} nats a token", "won"
        said.detail = (
            f"95 % interval of the paired difference to {second['label']}: {number(gap['low'])} to {number(gap['high'])} "
            f"over {gap['n']} seeds. {ahead}."
        )
    else:
        said.headline, said.tone = f"No clear winner between {best['label']} and {second['label']}", "open"
        said.detail = (
            f"The 95 % interval of their paired difference, {number(gap['low'])} to {number(gap['high'])} nats a token "
            f"over {gap['n']} seeds, holds zero. {ahead}."
        )
    seeds = min(rank["n"] for rank in comparable)
    if seeds < ENOUGH_SEEDS:
        said.warnings.append(
            f"{seeds} seed{'s' if seeds > 1 else ''} a setting: intervals this short of {ENOUGH_SEEDS} seeds are rough"
        )
    tokens = [one.totals["tokens"] for group in outcomes for one in group if one.totals["tokens"] and counts(one.run)]
    if tokens and max(tokens) > 1.05 * min(tokens):
        said.warnings.append(
            f"runs trained on {min(tokens):,.0f} to {max(tokens):,.0f} tokens: compare at equal tokens, in the curves"
        )
    return said


def _ranks(groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]], metric: Metric) -> list[dict[str, Any]]:
    rows = []
    for index, (group, ones) in enumerate(zip(groups, outcomes, strict=True)):
        end = spread(ones, metric.key)
        rows.append(
            {
                "group": index,
                "label": group.label,
                "n": end.n,
                "mean": _or_none(end.mean),
                "low": _or_none(end.low),
                "high": _or_none(end.high),
                "values": [
                    {"seed": one.run.seed, "run": one.run.name, "value": one.last[metric.key]}
                    for one in ones
                    if metric.key in one.last and counts(one.run)
                ],
                "difference": None,
            }
        )
    rows.sort(key=lambda row: math.inf if row["mean"] is None else row["mean"])
    best = by_seed(outcomes[rows[0]["group"]], metric.key)
    for row in rows[1:]:
        gap = paired(by_seed(outcomes[row["group"]], metric.key), best)
        if gap.n >= 2:
            row["difference"] = {"mean": gap.mean, "low": gap.low, "high": gap.high, "n": gap.n}
    return rows


def _facts(one: Outcome) -> list[tuple[str, str, str]]:
    facts = []
    for key, label in (("forward_kl", "KL(teacher ‖ student)"), ("jsd", "Jensen-Shannon")):
        if key in one.last:
            facts.append((label, number(one.last[key]), f"from {number(one.first[key])}"))
    for key, label in (("agreement", "Same top token"), ("accuracy", "Task accuracy")):
        if key in one.last:
            facts.append((label, f"{100 * one.last[key]:.1f} %", f"from {100 * one.first[key]:.1f} %"))
    return facts + _cost(one.totals)


def _mean_facts(outcomes: Sequence[Outcome], remark: str = "mean") -> list[tuple[str, str, str]]:
    facts = []
    for key, label in (("forward_kl", "KL(teacher ‖ student)"), ("jsd", "Jensen-Shannon")):
        end = spread(outcomes, key)
        if end.n:
            facts.append((label, number(end.mean), remark))
    for key, label in (("agreement", "Same top token"), ("accuracy", "Task accuracy")):
        end = spread(outcomes, key)
        if end.n:
            facts.append((label, f"{100 * end.mean:.1f} %", remark))
    mean: dict[str, float | None] = {}
    for key in outcomes[0].totals if outcomes else ():
        known = [value for one in outcomes if (value := one.totals[key]) is not None]
        mean[key] = sum(known) / len(known) if known else None
    return facts + _cost(mean)


def _cost(totals: dict[str, float | None]) -> list[tuple[str, str, str]]:
    """Tokens, teacher's work and time; what the diary does not say is left out."""
    said = []
    if (tokens := totals.get("tokens")) is not None:
        said.append(("Tokens trained on", short(tokens), ""))
    if (scored := totals.get("scored_tokens")) is not None:
        requests = totals.get("requests")
        said.append(("Teacher scored", short(scored), "tokens" + (f", {short(requests)} requests" if requests else "")))
    if (seconds := totals.get("seconds")) is not None:
        said.append(("Time", f"{seconds:,.0f} s", ""))
    return said


def _stated(comparison: dict[str, Any]) -> str:
    """The comparison's own verdict, if it is put into words."""
    stated = comparison.get("verdict")
    if isinstance(stated, str):
        return stated
    if isinstance(stated, dict):
        return next((str(stated[key]) for key in ("headline", "text", "sentence", "summary") if stated.get(key)), "")
    return ""


def number(value: float | None) -> str:
    """Four significant digits, a true minus sign; "?" for what is not known."""
    if value is None or not math.isfinite(value):
        return "?"
    return f"{value:.4g}".replace("-", "−")


def change(first: float, last: float) -> str:
    """The change in per cent."""
    if not (math.isfinite(first) and math.isfinite(last)) or first == 0.0:
        return "change unknown"
    return f"{100 * (last / first - 1):+.0f} %".replace("-", "−")


def between(end: Interval) -> str:
    """A mean with its interval."""
    if not math.isfinite(end.low):
        return number(end.mean)
    return f"{number(end.mean)} [{number(end.low)}, {number(end.high)}]"


def short(value: float) -> str:
    """A count in at most four digits: 153.6k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
