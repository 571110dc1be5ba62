"""What came of each run: where its divergences began and ended, and what the teacher was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topkd.report.analysis.formatting import NAMES
from topkd.report.analysis.intervals import Interval, compute_interval
from topkd.report.load.collection import RunGroup
from topkd.report.load.columns import has_column, read_column, sum_costs
from topkd.report.load.evaluations import FIXED, make_eval_source
from topkd.report.load.run_log import Run

EVALUATED = ("reverse_kl", "forward_kl", "jsd", "agreement", "accuracy")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run's ends.

    Attributes:
        run: The run.
        first: Metric -> value at the first evaluation (or over the first steps, for the estimate).
        last: Metric -> value at the last one.
        area: Mean of the main metric over the tokens of the run (area under its curve over its width).
        looks: How many values of the main metric there are.
        totals: Tokens, requests and seconds.
    """

    run: Run
    first: dict[str, float]
    last: dict[str, float]
    area: float
    looks: int
    totals: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Metric:
    """What the verdict is about."""

    key: str
    name: str
    exact: bool


EXACT = Metric("reverse_kl", NAMES["reverse_kl"], exact=True)
SAMPLED = Metric("kl_k1", f"estimated {EXACT.name}", exact=False)
ESTIMATES = (SAMPLED, Metric("sft_loss", "−log p of the data", exact=False))
# What the same field of the run log is where the student did not draw the completions: a number, and no distance.
LOG_RATIO = Metric("log_ratio", "log student/teacher ratio on the completions it replays", exact=False)


def main_metric(groups: Sequence[RunGroup], wanted: Any = None) -> Metric | None:
    """The exact held-out divergence where every run has it, else what steps estimate or tell; None before any.

    ``wanted`` is the one that a comparison judges by; without one, KL(student || teacher).
    """
    runs = [run for group in groups for run in group.runs]
    exact = Metric(wanted, NAMES[wanted], exact=True) if wanted in NAMES else EXACT
    if runs and all(has_column(make_eval_source(run, FIXED).records, exact.key) for run in runs):
        return exact
    estimates = (
        item
        for item in ESTIMATES
        if any(has_column(run.steps, item.key) for run in runs if item != SAMPLED or not run.foreign)
    )
    return next(estimates, LOG_RATIO if any(run.foreign for run in runs) else None)


def compute_outcome(run: Run, metric: Metric) -> Outcome:
    """The ends of one run."""
    evals = make_eval_source(run, FIXED)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for key in EVALUATED:
        values = read_column(evals.records, key)
        known = values[np.isfinite(values)]
        if known.size:
            first[key], last[key] = float(known[0]), float(known[-1])
    if not metric.exact:
        values = read_column(run.steps, SAMPLED.key if metric is LOG_RATIO else metric.key)
        known = values[np.isfinite(values)]
        own = metric
        if metric in (SAMPLED, LOG_RATIO):
            own = LOG_RATIO if run.foreign else SAMPLED
        if known.size:  # single steps are noisy: a tenth of the run at each end
            part = max(1, known.size // 10)
            first[own.key], last[own.key] = float(known[:part].mean()), float(known[-part:].mean())
        x, y = read_column(run.steps, "step"), values if own is metric else np.full_like(values, np.nan)
    else:
        y = read_column(evals.records, metric.key)
        x = evals.axes.get("tokens", evals.axes["step"])
    return Outcome(run, first, last, _area(x, y), int(np.isfinite(y).sum()), sum_costs(run))


def _area(x: Any, y: Any) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if x.size < 2 or x[-1] <= x[0]:
        return math.nan
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def values_by_seed(outcomes: Sequence[Outcome], key: str) -> dict[int, float]:
    """seed -> last value, of the runs that ended as planned: what may be compared."""
    return {
        item.run.seed: item.last[key]
        for item in outcomes
        if item.run.seed is not None and key in item.last and is_counted(item.run)
    }


def is_counted(run: Run) -> bool:
    """A run that failed, was stopped or was killed is in no verdict."""
    return run.state in ("finished", "running")


def select_counted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of a group's runs that its means are over; the only run of a group speaks for itself."""
    return [item for item in outcomes if is_counted(item.run) or len(outcomes) == 1]


def compute_spread(outcomes: Sequence[Outcome], key: str) -> Interval:
    """The last values of a group's runs, with their interval over seeds."""
    return compute_interval([item.last[key] for item in outcomes if key in item.last and is_counted(item.run)])
