"""The step records and evaluations of a run, with the x axes beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from topkd.report.load.collection import RunGroup
from topkd.report.load.columns import Floats, compute_axes_at, compute_step_axes, has_column, read_column
from topkd.report.load.run_log import LoggedRun, Record

FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Source:
    """A run's records of one kind, with the x axes beside them."""

    run: LoggedRun
    records: list[Record]
    axes: dict[str, Floats]


def make_step_source(run: LoggedRun) -> Source:
    """Return the step records of a run with their axes."""
    return Source(run, run.steps, compute_step_axes(run))


def make_eval_source(run: LoggedRun, prefixes: str) -> Source:
    """Return the evaluations on one kind of prefixes, placed on the axes by their step."""
    records = [record for record in run.evals if read_prefixes(record) == prefixes]
    axes = compute_step_axes(run)
    return Source(run, records, compute_axes_at(axes["step"], axes, read_column(records, "step")))


def read_prefixes(record: Record) -> str:
    """Return which prefixes an evaluation was on; the fixed ones where the record does not say."""
    value = record.get("prefixes")
    return value if isinstance(value, str) and value else FIXED


def list_prefix_kinds(groups: Sequence[RunGroup]) -> list[str]:
    """List the kinds of prefixes that evaluations were on, the fixed ones first."""
    kinds = {
        read_prefixes(record)
        for group in groups
        for run in group.runs
        for record in run.evals
        if has_column([record], "reverse_kl") or has_column([record], "accuracy")
    }
    return sorted(kinds, key=lambda kind: (kind != FIXED, kind))
