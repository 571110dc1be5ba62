"""First and last values of each run's metrics, their noise, and a ranking of settings by them."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from topkd.report.analysis.formatting import NAMES
from topkd.report.analysis.intervals import Interval, compute_interval, subtract_paired
from topkd.report.load.collection import RunGroup
from topkd.report.load.columns import FIXED, Floats, has_column, make_eval_source, read_column, sum_costs
from topkd.report.load.run_log import LoggedRun

EVALUATED = ("reverse_kl", "forward_kl", "jsd", "agreement", "accuracy")
SHARES = {
    "agreement": "eval_tokens",
    "accuracy": "answers",
}  # metrics that are shares, and the field with the number of their items
_Z95 = 1.96


@dataclass(frozen=True, slots=True)
class Outcome:
    """First and last values of one run's metrics.

    Attributes:
        run: The run.
        first: Metric -> value at the first evaluation (for an estimate: mean of the first steps).
        last: Metric -> value at the last one.
        area: Mean of the main metric over the tokens of the run (area under its curve, divided by its width).
        measurements: Number of values of the main metric.
        totals: Tokens, requests and seconds.
        noise: Metric -> half-width of the 95 % interval of last - first; absent if it is not known.
        counts: Share -> number of its positions (or answers).
    """

    run: LoggedRun
    first: dict[str, float]
    last: dict[str, float]
    area: float
    measurements: int
    totals: dict[str, float | None]
    noise: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def is_within_noise(self, key: str) -> bool:
        """Return whether the metric changed by at most its noise; False if the noise is unknown."""
        return key in self.noise and abs(self.last[key] - self.first[key]) <= self.noise[key]


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of the distance to the teacher, on which the verdict is based."""

    key: str
    name: str
    exact: bool


EXACT = Metric("reverse_kl", NAMES["reverse_kl"], exact=True)
SAMPLED = Metric("kl_k1", f"estimated {EXACT.name}", exact=False)
ESTIMATES = (SAMPLED, Metric("sft_loss", "−log p of the data", exact=False))
# The field kl_k1 of a run whose student did not sample the completions: a number, but not a distance.
LOG_RATIO = Metric("log_ratio", "log student/teacher ratio on replayed completions", exact=False)


def choose_metric(groups: Sequence[RunGroup], wanted: Any = None) -> Metric | None:
    """Choose the exact held-out divergence if every run has it, else an estimate from steps; None if there is none.

    ``wanted`` is the metric of a comparison; the default is KL(student || teacher).
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


def compute_outcome(run: LoggedRun, metric: Metric) -> Outcome:
    """Compute the first and last values, the area, the noise and the cost of one run."""
    evals = make_eval_source(run, FIXED)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    noise: dict[str, float] = {}
    counts: dict[str, int] = {}
    for key in EVALUATED:
        values = read_column(evals.records, key)
        known = values[np.isfinite(values)]
        if not known.size:
            continue
        first[key], last[key] = float(known[0]), float(known[-1])
        size = read_column(evals.records, SHARES[key])[-1] if key in SHARES else math.nan
        if math.isfinite(size) and size > 0:
            counts[key] = int(size)
            noise[key] = _compute_share_noise(first[key], last[key], counts[key])
    if not metric.exact:
        values = read_column(run.steps, SAMPLED.key if metric is LOG_RATIO else metric.key)
        known = values[np.isfinite(values)]
        own = metric
        if metric in (SAMPLED, LOG_RATIO):
            own = LOG_RATIO if run.foreign else SAMPLED
        if known.size:  # single steps are noisy: use the mean of a tenth of the run at each end
            part = max(1, known.size // 10)
            first[own.key], last[own.key] = float(known[:part].mean()), float(known[-part:].mean())
            if known.size > 2 and own is SAMPLED:
                noise[own.key] = _compute_step_noise(known, part)
        x, y = read_column(run.steps, "step"), values if own is metric else np.full_like(values, np.nan)
    else:
        y = read_column(evals.records, metric.key)
        x = evals.axes.get("tokens", evals.axes["step"])
    return Outcome(run, first, last, _compute_area(x, y), int(np.isfinite(y).sum()), sum_costs(run), noise, counts)


def _compute_share_noise(first: float, last: float, size: int) -> float:
    """Compute the 95 % half-width of the difference of two shares, each of ``size`` positions."""
    return _Z95 * math.sqrt((first * (1 - first) + last * (1 - last)) / size)


def _compute_step_noise(values: Floats, part: int) -> float:
    """Compute the 95 % half-width of the difference of two means of ``part`` steps, from differences of neighbours."""
    deviation = float(np.sqrt(np.mean(np.diff(values) ** 2) / 2))
    return _Z95 * deviation * math.sqrt(2 / part)


def _compute_area(x: Any, y: Any) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if x.size < 2 or x[-1] <= x[0]:
        return math.nan
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def collect_last_by_seed(outcomes: Sequence[Outcome], key: str) -> dict[int, float]:
    """Return seed -> last value, for the runs that count in a verdict."""
    return {
        item.run.seed: item.last[key]
        for item in outcomes
        if item.run.seed is not None and key in item.last and is_counted(item.run)
    }


def is_counted(run: LoggedRun) -> bool:
    """Return whether a run counts in a verdict: it did not fail and was not stopped or killed."""
    return run.state in ("finished", "running")


def select_counted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs that count in a group's means; the only run of a group always counts."""
    return [item for item in outcomes if is_counted(item.run) or len(outcomes) == 1]


def compute_spread(outcomes: Sequence[Outcome], key: str) -> Interval:
    """Compute the mean of a group's last values with its interval over seeds; cut that of a share to [0, 1]."""
    interval = compute_interval([item.last[key] for item in outcomes if key in item.last and is_counted(item.run)])
    return interval.within_shares() if key in SHARES else interval


@dataclass(frozen=True, slots=True)
class Rank:
    """One setting: ``difference`` is to the best one, over the seeds that both have; None if these are fewer than two.

    A ``control`` is a comparison's yardstick: it is ranked after the others, whatever its result is.
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

    An estimate from rollouts does not rank settings that trained on completions that the student did not sample.
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
