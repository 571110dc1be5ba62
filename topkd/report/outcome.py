"""What came of each run: where its divergences began and ended, and what the teacher was asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topkd.report.collection import Group
from topkd.report.columns import column, has, totals
from topkd.report.diary import METRICS, Record, Run, last_step
from topkd.report.intervals import Interval, interval
from topkd.report.lines import FIXED, eval_source
from topkd.report.wording import NAMES

_QUIET_S, _QUIET_STEPS = 900.0, 10.0  # of an unfinished run that is still taken to go on
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
ESTIMATES = (
    Metric("kl_k1", f"estimated {EXACT.name}", exact=False),
    Metric("sft_loss", "−log p of the data", exact=False),
)


def main_metric(groups: Sequence[Group], wanted: Any = None) -> Metric | None:
    """The exact held-out divergence where every run has it, else what its steps estimate; None before either.

    ``wanted`` is the one that a comparison judges by; without one, KL(student || teacher).
    """
    runs = [run for group in groups for run in group.runs]
    exact = Metric(wanted, NAMES[wanted], exact=True) if wanted in NAMES else EXACT
    if runs and all(has(eval_source(run, FIXED).records, exact.key) for run in runs):
        return exact
    return next((one for one in ESTIMATES if any(has(run.steps, one.key) for run in runs)), None)


def outcome(run: Run, metric: Metric) -> Outcome:
    """The ends of one run."""
    evals = eval_source(run, FIXED)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for key in EVALUATED:
        values = column(evals.records, key)
        known = values[np.isfinite(values)]
        if known.size:
            first[key], last[key] = float(known[0]), float(known[-1])
    if not metric.exact:
        values = column(run.steps, metric.key)
        known = values[np.isfinite(values)]
        if known.size:  # single steps are noisy: a tenth of the run at each end
            part = max(1, known.size // 10)
            first[metric.key], last[metric.key] = float(known[:part].mean()), float(known[-part:].mean())
        x, y = column(run.steps, "step"), values
    else:
        y = column(evals.records, metric.key)
        x = evals.axes.get("tokens", evals.axes["step"])
    return Outcome(run, first, last, _area(x, y), int(np.isfinite(y).sum()), totals(run))


def _area(x: Any, y: Any) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if x.size < 2 or x[-1] <= x[0]:
        return math.nan
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def by_seed(outcomes: Sequence[Outcome], key: str) -> dict[int, float]:
    """seed -> last value, of the runs that ended as planned: what may be compared."""
    return {
        one.run.seed: one.last[key]
        for one in outcomes
        if one.run.seed is not None and key in one.last and counts(one.run)
    }


def counts(run: Run) -> bool:
    """A failed or stopped run is in no verdict."""
    return run.state in ("finished", "running")


def spread(outcomes: Sequence[Outcome], key: str) -> Interval:
    """The last values of a group's runs, with their interval over seeds."""
    return interval([one.last[key] for one in outcomes if key in one.last and counts(one.run)])


@dataclass(frozen=True, slots=True)
class Warned:
    """Something to be careful about; runs that share the kind are named together."""

    kind: str
    text: str


def warnings_of(one: Outcome) -> list[Warned]:
    """What a careful reader would ask about a run."""
    run = one.run
    said: list[Warned] = []
    if run.state == "stopped":
        reason = next((event.get("reason") for event in run.events if event.get("event") == "stopped"), None)
        text = f"stopped at step {last_step(run.steps)} of {run.planned or '?'} ({reason or 'no reason given'})"
        said.append(Warned("stopped", text))
    if run.state == "running" and run.planned is not None and (quiet := silence(run)) is not None:
        text = f"unfinished, and nothing was written for {quiet}: was it killed? (topkd train --resume goes on)"
        said.append(Warned("silent", text))
    alarms = [event for event in run.events if event.get("event") == "alarm"]
    said += [Warned(f"alarm {_alarm(event)[1]}", _alarm(event)[0]) for event in alarms[:20]]
    if lost := one.totals.get("lost"):
        asked = float(np.nansum(column(run.steps, "samples"))) + lost
        said.append(Warned("lost", f"{lost:,.0f} of {asked:,.0f} samples were lost on the way to the teacher and back"))
    if skipped := sum(bool(record.get("skipped")) for record in run.steps):
        text = f"{skipped} of {len(run.steps)} steps changed no weight (`skipped` in the diary says why)"
        said.append(Warned("skipped", text))
    best = column(eval_source(run, FIXED).records, "reverse_kl")
    if best.size > 2 and np.isfinite(best).any() and best[-1] > 1.05 * np.nanmin(best):
        text = f"the last KL ({best[-1]:.4g}) is above the best one ({np.nanmin(best):.4g}): it was better before"
        said.append(Warned("worse", text))
    alarmed = {warned.kind for warned in said}
    return said + [warned for warned in _rates(run) if f"alarm {warned.kind}" not in alarmed]


def silence(run: Run) -> str | None:
    """For how long an unfinished run has written nothing, where that is far longer than its steps take."""
    try:
        quiet_s = time.time() - (run.path / METRICS).stat().st_mtime
    except OSError:
        return None
    taken = column(run.steps, "elapsed_s")
    slowest_s = float(np.nanmax(np.diff(taken, prepend=0.0))) if np.isfinite(taken).all() and taken.size else 0.0
    if quiet_s < max(_QUIET_S, _QUIET_STEPS * slowest_s):
        return None
    return f"{quiet_s / 3600:,.0f} hours" if quiet_s >= 7200 else f"{quiet_s / 60:,.0f} minutes"


def _rates(run: Run) -> list[Warned]:
    said = []
    ess = column(run.steps, "ess")
    if np.isfinite(ess).any() and np.nanmean(ess) < 0.5:
        said.append(Warned("ess", f"effective sample size {100 * np.nanmean(ess):.0f} % on average: far off-policy"))
    missing, tokens = column(run.steps, "missing_tokens"), column(run.steps, "completion_tokens")
    if np.nansum(missing) > 0:
        share = 100 * np.nansum(missing) / max(np.nansum(tokens), 1.0)
        text = f"{np.nansum(missing):,.0f} tokens ({share:.2g} %) had no teacher logprob and were masked"
        said.append(Warned("missing", text))
    truncated, samples = np.nansum(column(run.steps, "truncated")), np.nansum(column(run.steps, "samples"))
    if samples and truncated > 0.5 * samples:
        text = f"{100 * truncated / samples:.0f} % of completions were cut at the length limit"
        said.append(Warned("truncation_rate", text))
    return said


def _alarm(event: Record) -> tuple[str, str]:
    """An alarm in words, and its kind: the field that crossed its limit."""
    kind = str(event.get("alarm") or "alarm")
    value, limit = event.get("value"), event.get("limit")
    text = str(event.get("message") or kind)
    if isinstance(value, int | float) and isinstance(limit, int | float):
        text += f" was {value:.4g}, beyond its limit of {limit:.4g}"
    step = event.get("step")
    return (f"step {step}: {text}" if step is not None else text), kind
