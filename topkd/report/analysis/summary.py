"""The first sentence of a report: whether training worked, and what was done."""

from __future__ import annotations

from collections.abc import Sequence

from topkd.report.analysis.outcome import LOG_RATIO, Metric, Outcome, is_counted
from topkd.report.load.run_log import LoggedRun, find_last_step, flatten_settings

_DATA_LOSS = "sft_loss"


def summarize_run(item: Outcome, metric: Metric) -> str:
    """Say in one sentence whether a run worked and what it did."""
    steps, so_far = _describe_steps(item.run), " so far" if item.run.state == "running" else ""
    if metric.key not in item.last or _is_foreign(item, metric):
        return (
            f"Not known whether training worked: {steps}, and no measurement says whether the student came closer to "
            "the teacher."
        )
    if item.measurements < 2:
        return f"Not known yet whether training works: {steps}, and the student was measured only once."
    if item.is_within_noise(metric.key):
        return f"No clear change{so_far}: {steps}, and what the student's distance to the teacher changed is noise."
    if _is_closer(item, metric):
        result = "the student came closer to the teacher"
        return f"Training worked{so_far}: {steps}, and {_describe_data_loss(metric, 'better') or result}."
    if item.last[metric.key] == item.first[metric.key]:
        return f"No change{so_far}: {steps}, and the student is as far from the teacher as before."
    result = "the student is farther from the teacher than before"
    return f"Training did not work{so_far}: {steps}, and {_describe_data_loss(metric, 'worse') or result}."


def summarize_runs(outcomes: Sequence[Outcome], metric: Metric, label: str) -> str:
    """Say in one sentence in how many runs of one setting training worked."""
    counted = [item for item in outcomes if is_counted(item.run)]
    if metric is LOG_RATIO or not counted:
        return ""
    result = _describe_data_loss(metric, "better") or "the student came closer to the teacher"
    return f"Training worked in {_count_closer(counted, metric)} of {len(counted)} runs of {label}: {result}."


def summarize_settings(outcomes: Sequence[Sequence[Outcome]], metric: Metric, winner: str, *, finished: bool) -> str:
    """Say in one sentence which of several settings did best, and in how many runs training worked."""
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
    data = " on completions that it did not draw" if run.foreign else ""
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
