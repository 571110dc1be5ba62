"""Run log records as columns: one float per record (NaN if the record has no number), and their x axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topkd.report.load.collection import RunGroup
from topkd.report.load.run_log import LoggedRun, Record

Floats = NDArray[np.float64]


# Choices of x: key, label and unit.
AXES: Final = (
    ("tokens", "tokens trained on", "tokens"),
    ("step", "steps", "steps"),
    ("seconds", "seconds", "s"),
    ("cost", "tokens scored by the teacher", "tokens"),
    ("requests", "requests to the teacher", "requests"),
    ("bytes", "bytes from the teacher", "bytes"),
)
# Names that a count of a step may have in the run log; the first one that a run has is used.
_COST, _REQUESTS, _BYTES = ("scored_tokens", "completion_tokens"), ("requests",), ("teacher_bytes",)
_STAGES = ("sample_s", "score_wait_s", "learn_s")


def read_column(records: Sequence[Record], key: str) -> Floats:
    """Read a field of every record; NaN if it is absent, null, or not a number."""
    return np.array([_number(record.get(key)) for record in records], dtype=np.float64)


def has_column(records: Sequence[Record], key: str) -> bool:
    """Return whether any record has a number in the field."""
    return any(np.isfinite(_number(record.get(key))) for record in records)


def find_first_name(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """Find the first of the names that the records have."""
    return next((name for name in names if has_column(records, name)), None)


def compute_step_axes(run: LoggedRun) -> dict[str, Floats]:
    """Compute the x axes that a run's step records have."""
    if "axes" not in run.derived:
        run.derived["axes"] = _compute_step_axes(run.steps)
    axes: dict[str, Floats] = run.derived["axes"]
    return axes


def _compute_step_axes(records: Sequence[Record]) -> dict[str, Floats]:
    # Running sums: after a step without a count, every later sum is unknown (NaN) and not too small.
    axes = {"step": read_column(records, "step")}
    if has_column(records, "tokens"):
        axes["tokens"] = np.cumsum(read_column(records, "tokens"))
    if has_column(records, "elapsed_s"):
        axes["seconds"] = read_column(records, "elapsed_s")
    elif all(has_column(records, name) for name in _STAGES):
        axes["seconds"] = np.cumsum(np.sum([read_column(records, name) for name in _STAGES], axis=0))
    for key, names in (("cost", _COST), ("requests", _REQUESTS), ("bytes", _BYTES)):
        if (name := find_first_name(records, names)) is not None:
            axes[key] = np.cumsum(read_column(records, name))
    return axes


def compute_axes_at(steps: Floats, axes: dict[str, Floats], at: Floats) -> dict[str, Floats]:
    """Compute the axes at some step numbers: 0 before the first step, NaN at a step that has no record."""
    index = np.searchsorted(steps, at)
    inside = (index < steps.size) & (at > 0)
    safe = np.minimum(index, max(0, steps.size - 1))
    exact = inside & (steps[safe] == at) if steps.size else np.zeros(at.shape, dtype=bool)
    out = {}
    for key, values in axes.items():
        known = np.where(exact, values[safe] if values.size else np.nan, np.nan)
        out[key] = np.where(at <= 0, 0.0, known)
    out["step"] = at
    return out


def sum_costs(run: LoggedRun) -> dict[str, float | None]:
    """Sum the costs of a run over its steps; None for a cost that the run log does not have."""
    names = {"tokens": ("tokens",), "scored_tokens": _COST, "requests": _REQUESTS, "teacher_bytes": _BYTES}
    names |= {"retries": ("retries",), "cache_hits": ("cache_hits",)}
    sums: dict[str, float | None] = {}
    for key, choices in names.items():
        name = find_first_name(run.steps, choices)
        sums[key] = None if name is None else _known(float(np.nansum(read_column(run.steps, name))))
    seconds = compute_step_axes(run).get("seconds")
    sums["seconds"] = _known(float(seconds[-1])) if seconds is not None and seconds.size else None
    lost = [record["lost"] for record in run.steps if isinstance(record.get("lost"), dict)]
    sums["lost"] = float(sum(_number(count) for counts in lost for count in counts.values())) if lost else None
    return sums


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any size
        return float("nan")


FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Source:
    """A run's records of one kind, with their x axes."""

    run: LoggedRun
    records: list[Record]
    axes: dict[str, Floats]


def make_step_source(run: LoggedRun) -> Source:
    """Return the step records of a run with their axes."""
    return Source(run, run.steps, compute_step_axes(run))


def make_eval_source(run: LoggedRun, prefixes: str) -> Source:
    """Return the evaluations on one kind of prefixes, with the axes at their steps."""
    records = [record for record in run.evals if read_prefixes(record) == prefixes]
    axes = compute_step_axes(run)
    return Source(run, records, compute_axes_at(axes["step"], axes, read_column(records, "step")))


def read_prefixes(record: Record) -> str:
    """Return the kind of prefixes of an evaluation; the fixed ones if the record names none."""
    value = record.get("prefixes")
    return value if isinstance(value, str) and value else FIXED


def list_prefix_kinds(groups: Sequence[RunGroup]) -> list[str]:
    """List the kinds of prefixes of all evaluations, the fixed ones first."""
    kinds = {
        read_prefixes(record)
        for group in groups
        for run in group.runs
        for record in run.evals
        if has_column([record], "reverse_kl") or has_column([record], "accuracy")
    }
    return sorted(kinds, key=lambda kind: (kind != FIXED, kind))
