"""Warnings about a run, with advice."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from topkd.report.analysis.outcome import Outcome
from topkd.report.load.columns import FIXED, make_eval_source, read_column
from topkd.report.load.run_folder import RUN_LOG
from topkd.report.load.run_log import LoggedRun, Record, find_last_step

_QUIET_S, _QUIET_STEPS = 900.0, 10.0  # seconds, and step times, without a record before a run counts as silent
_FRAGMENT = 64  # tokens: a limit up to this length is meant to cut completions
_NEARLY_ALL = 0.9  # share of completions
_ENDS = "raise rollout.max_completion_tokens, or name the tokens that end an answer in rollout.stop_token_ids"
# Field -> its name, and advice if it crosses its limit.
_ALARMS: Final = {
    "truncation_rate": ("the share of completions cut at their limit", _ENDS),
    "length_mean": (
        "the mean completion length",
        "read the samples in the explorer below; a lower learner.lr changes the student's text less",
    ),
    "eos_probability": ("the probability of ending", f"the student forgets how to end: lower learner.lr, or {_ENDS}"),
    "mismatch_kl": (
        "KL(sampler ‖ trainer) of the same weights",
        "sample in the learner's precision, at temperature 1 and with no top_p or top_k",
    ),
    "sync_kl": (
        "KL(sampler ‖ learner) after a push",
        "check that the server uses the adapter or weights that were sent, in the learner's precision",
    ),
}


@dataclass(frozen=True, slots=True)
class RunWarning:
    """A warning about a run. If more than two runs have the same ``kind``, it is shown once, with their number."""

    kind: str
    text: str


def find_warnings(item: Outcome) -> list[RunWarning]:
    """Find the warnings about a run."""
    run = item.run
    warnings: list[RunWarning] = []
    last = f"step {find_last_step(run.steps)} of {run.planned or '?'}"
    if run.state == "stopped":
        reason = next((event.get("reason") for event in run.events if event.get("event") == "stopped"), None)
        warnings.append(RunWarning("stopped", f"stopped at {last} ({reason or 'no reason given'})"))
    onwards = "run the same topkd compare again" if "arm" in run.params else "--resume continues from a checkpoint"
    if run.state == "unfinished":
        text = f"ended at {last} without a final record, and no process of this machine works on it: was it killed?"
        warnings.append(RunWarning("silent", f"{text} ({onwards})"))
    if run.state == "running" and run.planned is not None and (quiet := find_silence(run)) is not None:
        text = f"unfinished, and nothing was written for {quiet}: was it killed? ({onwards})"
        warnings.append(RunWarning("silent", text))
    meant = describe_short_limit(run)
    alarms = [_describe_alarm(event) for event in run.events if event.get("event") == "alarm"]
    alarms = [alarm for alarm in alarms if not (meant and alarm.kind == "alarm truncation_rate")]
    warnings += alarms[:20]
    if lost := item.totals.get("lost"):
        asked = float(np.nansum(read_column(run.steps, "samples"))) + lost
        text = f"{lost:,.0f} of {asked:,.0f} samples were lost: they have no score"
        warnings.append(RunWarning("lost", text))
    if skipped := sum(bool(record.get("skipped")) for record in run.steps):
        text = f"{skipped} of {len(run.steps)} steps changed no weight (`skipped` in the run log has the reason)"
        warnings.append(RunWarning("skipped", text))
    best = read_column(make_eval_source(run, FIXED).records, "reverse_kl")
    if best.size > 2 and np.isfinite(best).any() and best[-1] > 1.05 * np.nanmin(best):
        text = f"the last KL ({best[-1]:.4g}) is above the best one ({np.nanmin(best):.4g}): it was better before"
        warnings.append(RunWarning("worse", text))
    alarmed = {warning.kind for warning in warnings}
    rates = [warning for warning in _find_high_rates(run) if not (meant and warning.kind == "truncation_rate")]
    return warnings + [warning for warning in rates if f"alarm {warning.kind}" not in alarmed]


def describe_short_limit(run: LoggedRun) -> str:
    """Describe a limit of a few tokens, which cuts completions on purpose; "" if the limit is higher."""
    rollout = run.config.get("rollout")
    limit = rollout.get("max_completion_tokens") if isinstance(rollout, dict) else None
    truncated, samples = np.nansum(read_column(run.steps, "truncated")), np.nansum(read_column(run.steps, "samples"))
    if not isinstance(limit, int) or limit > _FRAGMENT or not samples or truncated < _NEARLY_ALL * samples:
        return ""
    return (
        f"Completions were cut at rollout.max_completion_tokens = {limit}, which is normal for so short a limit. "
        "Raise it for answers that end by themselves."
    )


def find_silence(run: LoggedRun) -> str | None:
    """Describe for how long an unfinished run has written nothing; None unless that is far longer than its steps."""
    try:
        quiet_s = time.time() - (run.path / RUN_LOG).stat().st_mtime
    except OSError:
        return None
    taken = read_column(run.steps, "elapsed_s")
    slowest_s = float(np.nanmax(np.diff(taken, prepend=0.0))) if np.isfinite(taken).all() and taken.size else 0.0
    if quiet_s < max(_QUIET_S, _QUIET_STEPS * slowest_s):
        return None
    return f"{quiet_s / 3600:,.0f} hours" if quiet_s >= 7200 else f"{quiet_s / 60:,.0f} minutes"


def _find_high_rates(run: LoggedRun) -> list[RunWarning]:
    warnings = []
    ess = read_column(run.steps, "ess")
    if np.isfinite(ess).any() and np.nanmean(ess) < 0.5:
        text = f"effective sample size {100 * np.nanmean(ess):.0f} % on average: far off-policy"
        warnings.append(RunWarning("ess", text))
    missing, tokens = read_column(run.steps, "missing_tokens"), read_column(run.steps, "completion_tokens")
    if np.nansum(missing) > 0:
        share = 100 * np.nansum(missing) / max(np.nansum(tokens), 1.0)
        text = f"{np.nansum(missing):,.0f} tokens ({share:.2g} %) had no teacher logprob and were masked"
        warnings.append(RunWarning("missing", text))
    truncated, samples = np.nansum(read_column(run.steps, "truncated")), np.nansum(read_column(run.steps, "samples"))
    if samples and truncated > 0.5 * samples:
        text = f"{100 * truncated / samples:.0f} % of completions were cut at the length limit: {_ENDS}"
        warnings.append(RunWarning("truncation_rate", text))
    return warnings


def _describe_alarm(event: Record) -> RunWarning:
    """Describe an alarm; its kind is the name of the field that crossed its limit."""
    kind = str(event.get("alarm") or "alarm")
    value, limit = event.get("value"), event.get("limit")
    name, advice = _ALARMS.get(kind, (kind, ""))
    text = str(event.get("message") or name)
    if isinstance(value, int | float) and isinstance(limit, int | float):
        text += f" was {value:.4g}, beyond its limit of {limit:.4g}"
    if advice:
        text += f" ({kind}): {advice}"
    step = event.get("step")
    return RunWarning(f"alarm {kind}", f"step {step}: {text}" if step is not None else text)
