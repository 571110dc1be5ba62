"""The verdict of a report: what happened, which setting won and by how much, and warnings."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topkd.report.analysis.formatting import (
    compute_mean,
    format_change,
    format_interval,
    format_number,
    format_percent,
    format_short_count,
)
from topkd.report.analysis.intervals import compute_interval
from topkd.report.analysis.outcome import (
    LOG_RATIO,
    SAMPLED,
    Metric,
    Outcome,
    Rank,
    choose_metric,
    compute_outcome,
    compute_spread,
    is_counted,
    rank_groups,
    select_counted,
)
from topkd.report.analysis.warnings import RunWarning, describe_short_limit, find_warnings
from topkd.report.load.collection import Collection, RunGroup, gather
from topkd.report.load.run_log import LoggedRun, Record, find_last_step, flatten_settings

ENOUGH_SEEDS = 8
FEW_SEEDS = 4  # with fewer, a comparison is a first look, whatever its intervals are
EMBEDDED = "embedded"
OF_TEXT = "Next token of real text"  # the name of accuracy on the embedded pair, which has no task
_DATA_LOSS = "sft_loss"
_CUT = (
    "The embedded pair has no stop token: every completion is cut at the limit, so that all steps have equally many "
    "tokens."
)
_DISTANCES = (("forward_kl", "KL(teacher ‖ student)"), ("jsd", "Jensen-Shannon"))
_UNDRAWN = (
    "completions that the trained student did not sample: log s − log t on them does not estimate "
    "KL(student ‖ teacher), and neither a lower nor a higher value is better"
)
_BASIS = {
    "kl_k1": "On its own rollouts",
    "sft_loss": "On the data that it trained on",
    "log_ratio": f"On {_UNDRAWN}",
}
_RESTS = {
    "kl_k1": ": the verdict is based on the estimate from rollouts",
    "sft_loss": ": the verdict is based on the training loss on the data",
    "log_ratio": ", and no estimate of it: [eval] in the run file measures the distance between student and teacher",
}
_UNDECIDED = "No winner: these run logs have no KL with which the settings could be compared"
_SHARES = (("agreement", "Same top token", "positions"), ("accuracy", "Task accuracy", "answers"))


@dataclass(slots=True)
class ReportVerdict:
    """The text at the top of the page.

    Attributes:
        headline: The result in one sentence, with its numbers.
        summary: What was done and whether it worked, in plain words.
        caveat: The reason why a comparison is only a first look; "" if it is more.
        detail: How certain the result is.
        tone: "won", "open" (no clear winner), "one" (a single setting) or "waiting".
        facts: Further numbers: label, value, remark.
        facts_of: The run or setting of these numbers, if it is not obvious.
        warnings: Warnings about the runs.
        ranks: Settings from best to worst.
        metric: Name of the metric of the ranks.
        note: The note of the comparison's config.
        notes: Remarks about the runs.
    """

    headline: str
    summary: str = ""
    caveat: str = ""
    detail: str = ""
    tone: str = "one"
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    facts_of: str = ""
    warnings: list[str] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    metric: str = ""
    note: str = ""
    notes: list[str] = field(default_factory=list)


def write_verdict(collection: Collection, groups: Sequence[RunGroup]) -> tuple[ReportVerdict, list[list[Outcome]]]:
    """Compose the verdict on the groups; return it, and for each group the outcomes that it is based on."""
    metric = choose_metric(groups, collection.comparison.get("metric"))
    if metric is None:
        return _describe_nothing(groups), [[] for _ in groups]
    outcomes = [[compute_outcome(run, metric) for run in group.runs] for group in groups]
    if len(groups) == 1 == len(outcomes[0]):
        statement = _describe_run(outcomes[0][0], metric)
    elif len(groups) == 1:
        statement = _describe_group(groups[0], outcomes, metric)
    else:
        statement = _describe_several(groups, outcomes, metric, collection.controls)
        statement.caveat = _write_caveat(collection, groups, statement.ranks)
    statement.metric = metric.name
    _use_stated_verdict(statement, collection.comparison)
    statement.summary = _write_summary(statement, collection, groups, outcomes, metric)
    if not metric.exact:
        rests = _RESTS[(LOG_RATIO if statement.headline == _UNDECIDED else metric).key]
        statement.warnings.insert(0, f"no exact held-out KL in the run log{rests}")
    if collection.unfinished:
        count = sum(len(group.runs) for group in groups)
        statement.detail = f"So far: {statement.headline}. {statement.detail}"
        statement.headline = f"Not finished: {count} run{'s' * (count > 1)} so far, and no verdict"
        statement.tone = "open"
    found = [(item, warning) for ones in outcomes for item in ones for warning in find_warnings(item)]
    if collection.comparison.get("base") == EMBEDDED:
        statement.notes.append(_CUT)
        statement.facts = [(OF_TEXT if fact[0] == _SHARES[1][1] else fact[0], *fact[1:]) for fact in statement.facts]
        found = [(item, warning) for item, warning in found if not warning.kind.endswith("truncation_rate")]
    else:
        limits = (describe_short_limit(item.run) for ones in outcomes for item in ones)
        statement.notes += dict.fromkeys(filter(None, limits))
    statement.warnings += _gather_warnings(found, sum(map(len, outcomes)))
    statement.warnings += collection.notes
    return statement, outcomes


def judge_folder(path: Path) -> ReportVerdict:
    """Compose the verdict on the run, or the comparison, in one folder."""
    collection = gather([path])
    return write_verdict(collection, collection.groups())[0]


def _write_summary(
    statement: ReportVerdict,
    collection: Collection,
    groups: Sequence[RunGroup],
    outcomes: Sequence[Sequence[Outcome]],
    metric: Metric,
) -> str:
    if len(groups) > 1:
        winner = statement.ranks[0].label if statement.tone == "won" and statement.ranks else ""
        stated = collection.comparison.get("verdict")
        if isinstance(stated, dict) and (name := stated.get("winner")):
            arms = (arm for arm in collection.comparison.get("arms") or () if isinstance(arm, dict))
            winner = next((str(arm.get("label") or name) for arm in arms if arm.get("name") == name), str(name))
        return _summarize_settings(outcomes, metric, winner, finished=not collection.unfinished)
    counted = select_counted(outcomes[0])
    if len(counted) == 1:
        return _summarize_run(counted[0], metric)
    return _summarize_runs(counted, metric, groups[0].label)


def _summarize_run(item: Outcome, metric: Metric) -> str:
    """Summarize in one sentence whether a run worked and what it did."""
    steps, so_far = _describe_steps(item.run), " so far" if item.run.state == "running" else ""
    if metric.key not in item.last or _is_foreign(item, metric):
        unknown = "no measurement shows whether the student came closer to the teacher"
        return f"Not known whether training worked: {steps}, and {unknown}."
    if item.measurements < 2:
        return f"Not known yet whether training works: {steps}, and the student was measured only once."
    if item.is_within_noise(metric.key):
        return f"No clear change{so_far}: {steps}, and the change of the distance to the teacher is within noise."
    if _is_closer(item, metric):
        result = "the student came closer to the teacher"
        return f"Training worked{so_far}: {steps}, and {_describe_data_loss(metric, 'better') or result}."
    if item.last[metric.key] == item.first[metric.key]:
        return f"No change{so_far}: {steps}, and the student is as far from the teacher as before."
    result = "the student is farther from the teacher than before"
    return f"Training did not work{so_far}: {steps}, and {_describe_data_loss(metric, 'worse') or result}."


def _summarize_runs(outcomes: Sequence[Outcome], metric: Metric, label: str) -> str:
    """Summarize in one sentence in how many runs of one setting training worked."""
    counted = [item for item in outcomes if is_counted(item.run)]
    if metric is LOG_RATIO or not counted:
        return ""
    result = _describe_data_loss(metric, "better") or "the student came closer to the teacher"
    return f"Training worked in {_count_closer(counted, metric)} of {len(counted)} runs of {label}: {result}."


def _summarize_settings(outcomes: Sequence[Sequence[Outcome]], metric: Metric, winner: str, *, finished: bool) -> str:
    """Summarize in one sentence which of several settings did best, and in how many runs training worked."""
    counted = [item for group in outcomes for item in group if is_counted(item.run)]
    result = f"{winner} did best" if winner else "none is clearly the best"
    what = f"{len(outcomes)} settings were compared in {len(counted)} runs"
    if not finished:
        return f"The comparison of {len(outcomes)} settings is not finished."
    if metric is LOG_RATIO:
        return f"{what}: {result}."
    closer = _count_closer(counted, metric)
    better = _describe_data_loss(metric, "better") or "the student came closer to the teacher"
    return f"{what}: {result}. In {closer if closer < len(counted) else 'all'} of them {better}."


def _describe_steps(run: LoggedRun) -> str:
    steps = find_last_step(run.steps)
    kind = run.params.get("objective.kind") or flatten_settings(run.config).get("objective.kind")
    count = f"{steps:,}" if run.planned in (None, steps) else f"{steps:,} of {run.planned:,}"
    data = " on completions that it did not sample" if run.foreign else ""
    return f"{count} step{'s' * (count != '1')}{f' of {kind}' if kind else ''}{data}"


def _is_foreign(item: Outcome, metric: Metric) -> bool:
    return metric is LOG_RATIO or (item.run.foreign and not metric.exact and metric.key != _DATA_LOSS)


def _is_closer(item: Outcome, metric: Metric) -> bool:
    known = metric.key in item.last and item.measurements > 1 and not _is_foreign(item, metric)
    return known and item.last[metric.key] < item.first[metric.key] and not item.is_within_noise(metric.key)


def _count_closer(outcomes: Sequence[Outcome], metric: Metric) -> int:
    return sum(_is_closer(item, metric) for item in outcomes)


def _describe_data_loss(metric: Metric, way: str) -> str:
    return f"the student predicts the data {way} than before" if metric.key == _DATA_LOSS else ""


def _describe_nothing(groups: Sequence[RunGroup]) -> ReportVerdict:
    runs = [run for group in groups for run in group.runs]
    steps = max((find_last_step(run.steps) for run in runs), default=0)
    if not steps:
        return ReportVerdict("Waiting for the first step.", tone="waiting")
    losses = [step["loss"] for step in runs[0].steps if _has_list_loss(step)] if len(runs) == 1 else []
    if losses:
        span = f"from {format_number(losses[0])} to {format_number(losses[-1])} nats"
        detail = f"{steps:,} steps; nothing in the run log measures the distance between student and teacher."
        return ReportVerdict(f"The loss on the teacher's lists went {span}", detail=detail, tone="open")
    detail = f"{steps:,} steps, without an evaluation or an estimate of the distance: the curves are below."
    headline = "Nothing in the run log measures the distance between student and teacher"
    return ReportVerdict(headline, detail=detail, tone="open")


def _has_list_loss(step: Record) -> bool:
    """Return whether the step's loss is over teacher lists: such a step also logs their mass."""
    return all(isinstance(step.get(key), int | float) and math.isfinite(step[key]) for key in ("loss", "teacher_mass"))


def _describe_run(item: Outcome, metric: Metric) -> ReportVerdict:
    first, last = item.first.get(metric.key, math.nan), item.last.get(metric.key, math.nan)
    steps = find_last_step(item.run.steps)
    where = "On held-out prefixes, exact over the whole vocabulary" if metric.exact else _BASIS[metric.key]
    detail = f"{where}; {steps:,} of {item.run.planned or steps:,} steps, {item.run.state}."
    if item.measurements < 2:
        headline = f"{metric.name} is {format_number(last)} nats a token at the first measurement"
        return ReportVerdict(headline, detail=detail, facts=_list_facts(item))
    share = "" if metric is LOG_RATIO else _format_share(first, last, is_noise=item.is_within_noise(metric.key))
    span = f"{'fell' if last < first else 'rose'} from {format_number(first)} to" if first != last else "stayed at"
    headline = f"{metric.name} {span} {format_number(last)} nats a token{share}"
    return ReportVerdict(headline, detail=detail, facts=_list_facts(item))


def _format_share(first: float, last: float, *, is_noise: bool) -> str:
    """Format the change in per cent; add whether it is within noise."""
    share = format_change(first, last)
    if not is_noise:
        return share
    return f"{share.removesuffix(')')}, within noise)" if share else " (within noise)"


def _describe_group(group: RunGroup, outcomes: Sequence[Sequence[Outcome]], metric: Metric) -> ReportVerdict:
    ended = [item for item in outcomes[0] if is_counted(item.run) and metric.key in item.last]
    left = len(outcomes[0]) - len(ended)
    aside = f" {left} other run{'s' * (left > 1)} did not end as planned and {'are' if left > 1 else 'is'} not counted."
    aside = aside if left else ""
    if not ended:
        return ReportVerdict(f"No run of {group.label} has ended as planned", tone="open")
    if len(ended) == 1:
        statement = _describe_run(ended[0], metric)
        statement.detail, statement.facts_of = f"{statement.detail}{aside}", ended[0].run.name
        return statement
    end = compute_spread(ended, metric.key)
    start = [item.first[metric.key] for item in ended]
    first = sum(start) / len(start)
    seeds = {item.run.seed for item in ended}
    differ = "that differ in their seed, with the 95 % interval over them."
    if None in seeds or len(seeds) < len(ended):
        differ = "of which some share a seed: the interval shows how runs repeat, not how seeds differ."
    moved = compute_interval([item.last[metric.key] - item.first[metric.key] for item in ended])
    is_noise = moved.low <= 0.0 <= moved.high
    share = "" if metric is LOG_RATIO else _format_share(first, end.mean, is_noise=is_noise)
    if metric is LOG_RATIO:
        differ += f" {_BASIS[metric.key]}."
    return ReportVerdict(
        f"{metric.name} went from {format_number(first)} to {format_interval(end)} nats a token{share}",
        detail=f"Mean over {end.n} runs of {group.label} {differ}{aside}",
        facts=_list_mean_facts(ended),
        facts_of="means over seeds" if len(seeds) == len(ended) else "means over runs",
        ranks=rank_groups([group], outcomes, metric),
    )


def _describe_several(
    groups: Sequence[RunGroup], outcomes: list[list[Outcome]], metric: Metric, controls: Container[str]
) -> ReportVerdict:
    undrawn = [group.label for group in groups if group.foreign] if metric in (SAMPLED, LOG_RATIO) else []
    aside = f"{', '.join(undrawn)}: trained on {_UNDRAWN}; not ranked by it" if undrawn else ""
    ranks = [] if metric is LOG_RATIO else rank_groups(groups, outcomes, metric, controls)
    comparable = [rank for rank in ranks if math.isfinite(rank.end.mean) and not rank.control]
    if len(comparable) < 2 and undrawn:
        return ReportVerdict(_UNDECIDED, detail=f"{aside}.", tone="open")
    if len(comparable) < 2:
        return ReportVerdict("No two settings have finished runs to compare.", tone="open", ranks=ranks)
    best, *others = comparable
    # The next setting that is not clearly worse; if all are, the second.
    second = next((item for item in others if item.difference is None or item.difference.low <= 0.0), others[0])
    gap = second.difference
    facts, facts_of = _list_mean_facts(outcomes[best.group]), f"{best.label}, means over seeds"
    statement = ReportVerdict("", tone="open", ranks=ranks, facts=facts, facts_of=facts_of)
    ends = f"{best.label} ends at {format_number(best.end.mean)} nats a token"
    ends += f", {second.label} at {format_number(second.end.mean)}"
    if gap is None:
        statement.headline = f"{best.label} has the lower {metric.name}, but this may be chance"
        statement.detail = f"{ends}. They have fewer than two seeds in common, so there is no paired interval."
    else:
        span = f"{format_number(gap.low)} to {format_number(gap.high)} nats a token over {gap.n} seeds"
        if gap.low > 0.0:
            statement.headline = f"{best.label} wins: {metric.name} lower by {format_number(gap.mean)} nats a token"
            statement.tone = "won"
            statement.detail = f"95 % interval of the paired difference to {second.label}: {span}. {ends}."
        else:
            statement.headline = f"No clear winner between {best.label} and {second.label}"
            ahead = f"is below zero: on the seeds that both have, {second.label} is better"
            holds = "contains zero" if gap.high >= 0.0 else ahead
            statement.detail = f"The 95 % interval of their paired difference, {span}, {holds}. {ends}."
    statement.warnings += [*filter(None, [aside]), *_list_doubts(comparable, outcomes)]
    return statement


def _list_doubts(ranks: Sequence[Rank], outcomes: Sequence[Sequence[Outcome]]) -> list[str]:
    doubts = []
    seeds = min(rank.end.n for rank in ranks)
    if seeds < ENOUGH_SEEDS:
        doubts.append(
            f"{seeds} seed{'s' * (seeds > 1)} per setting: intervals from fewer than {ENOUGH_SEEDS} are rough"
        )
    if any(len({dot["seed"] for dot in rank.values}) < len(rank.values) for rank in ranks):
        repeat = "the interval shows how runs repeat, not how seeds differ"
        doubts.append(f"runs of one setting share a seed, or have none: {repeat}")
    tokens = [item.totals["tokens"] for ones in outcomes for item in ones if is_counted(item.run)]
    known = [count for count in tokens if count]
    if known and max(known) > 1.05 * min(known):
        doubts.append(f"runs trained on {min(known):,.0f} to {max(known):,.0f} tokens: compare them at equal tokens")
    return doubts


def _write_caveat(collection: Collection, groups: Sequence[RunGroup], ranks: Sequence[Rank]) -> str:
    """Explain why a comparison is only a first look; "" if it is more."""
    seeds = min((rank.end.n for rank in ranks if rank.end.n and not rank.control), default=0)
    arms = [arm for arm in collection.comparison.get("arms") or () if isinstance(arm, dict)]
    has_rates = any(arm.get("lr") is not None or "learner" in (arm.get("set") or ()) for arm in arms)
    few = [f"{seeds} seed{'s' * (seeds > 1)} per setting"] if 0 < seeds < FEW_SEEDS else []
    if arms and not has_rates and not collection.comparison.get("tuned"):
        few.append("one learning rate for all, not tuned")
    if not few:
        return ""
    steps = max((find_last_step(run.steps) for group in groups for run in group.runs), default=0)
    return f"A first look, not a result: {', '.join([*few, f'{steps:,} steps per run'])}."


def _use_stated_verdict(statement: ReportVerdict, comparison: dict[str, Any]) -> None:
    """Replace the page's verdict by the comparison's own, which takes tuning, areas and last values into account."""
    statement.note = str(comparison.get("note") or "")
    stated = comparison.get("verdict")
    text = stated.get("text") if isinstance(stated, dict) else None
    if isinstance(stated, dict) and isinstance(text, str) and text:
        known = [rank for rank in statement.ranks if math.isfinite(rank.end.mean)]
        ends = [f"{rank.label} {format_number(rank.end.mean)}" for rank in known]
        lines = [str(stated.get("ends") or ""), f"Last values, nats a token: {', '.join(ends)}." if ends else ""]
        statement.detail = " ".join(part for part in lines if part)
        statement.headline, statement.tone = text, "won" if stated.get("winner") else "open"
    statement.warnings += [f"tuning: {reason}" for reason in comparison.get("refused") or ()]


def _list_facts(item: Outcome) -> list[tuple[str, str, str]]:
    facts = []
    for key, label, *unit in (*_DISTANCES, *_SHARES):
        if key in item.last and unit:
            facts.append((label, format_percent(item.last[key]), _describe_share(item, key, *unit)))
        elif key in item.last:
            facts.append((label, format_number(item.last[key]), f"from {format_number(item.first[key])}"))
    return facts + _list_costs(item.totals)


def _describe_share(item: Outcome, key: str, unit: str) -> str:
    """Describe a share's first value, its number of items, and whether its change is within noise."""
    noise = ", within noise" if item.is_within_noise(key) and item.measurements > 1 else ""
    size = f" (of {item.counts[key]:,} {unit})" if key in item.counts else ""
    return f"from {format_percent(item.first[key])}{noise}{size}"


def _list_mean_facts(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str]]:
    facts = []
    for key, label, *unit in (*_DISTANCES, *_SHARES):
        if (end := compute_spread(outcomes, key)).n:
            facts.append((label, format_percent(end.mean) if unit else format_number(end.mean), ""))
    keys, counted = outcomes[0].totals if outcomes else (), select_counted(outcomes)
    return facts + _list_costs({key: compute_mean(item.totals[key] for item in counted) for key in keys})


def _list_costs(totals: dict[str, float | None]) -> list[tuple[str, str, str]]:
    """List tokens, scored tokens and time; leave out values that the run log does not have."""
    costs = []
    if (tokens := totals.get("tokens")) is not None:
        costs.append(("Tokens trained on", format_short_count(tokens), ""))
    if (scored := totals.get("scored_tokens")) is not None:
        requests = totals.get("requests")
        remark = f"tokens, {format_short_count(requests)} requests" if requests else "tokens"
        costs.append(("Teacher scored", format_short_count(scored), remark))
    if (seconds := totals.get("seconds")) is not None:
        costs.append(("Time", f"{seconds:,.0f} s", ""))
    return costs


def _gather_warnings(warnings: Sequence[tuple[Outcome, RunWarning]], runs: int) -> list[str]:
    """Gather the warnings of all ``runs``; a kind that more than two runs have is listed once, with their number."""
    by_kind: dict[str, list[tuple[Outcome, RunWarning]]] = {}
    for item, warning in warnings:
        by_kind.setdefault(warning.kind, []).append((item, warning))
    gathered = []
    for same in by_kind.values():
        if len(same) > 2:
            item, warning = same[0]
            gathered.append(f"{len(same)} runs: {warning.text} ({item.run.name}; the others are similar)")
        else:
            gathered += [warning.text if runs == 1 else f"{item.run.name}: {warning.text}" for item, warning in same]
    return gathered
