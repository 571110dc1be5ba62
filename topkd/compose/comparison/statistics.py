"""Statistics of finished cells: areas, tokens to target, paired ratios with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from topkd.report.analysis.intervals import compute_paired_ratio


def summarize_curve(evals: Sequence[Mapping[str, Any]], metric: str, target: float) -> dict[str, Any]:
    """Summarize one run's curve in three numbers.

    ``area`` is the mean of metric / first metric over the tokens trained on (trapezoids; 1 = learnt nothing, lower is
    better). ``final`` is the last value. ``tokens_to_target`` is where the curve first falls to ``target`` of its first
    value, interpolated between evaluations; None, with ``censored`` true, when it never does.
    """
    tokens = np.array([record["tokens"] for record in evals], dtype=np.float64)
    values = np.array([np.nan if record[metric] is None else record[metric] for record in evals], dtype=np.float64)
    whole = len(tokens) > 1 and bool(np.isfinite(values).all())
    share = values / values[0]
    area = float(np.trapezoid(share, tokens) / (tokens[-1] - tokens[0])) if whole else math.nan
    reached = None
    below = np.flatnonzero(share <= target)
    if whole and below.size:
        i = int(below[0])
        span = share[i - 1] - share[i]
        reached = float(tokens[i - 1] + (tokens[i] - tokens[i - 1]) * (share[i - 1] - target) / span) if i else 0.0
    return {
        "first": float(values[0]),
        "final": float(values[-1]),
        "area": area,
        "tokens_to_target": reached,
        "censored": reached is None,
    }


def estimate_paired_ratio(ours: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Compute the paired ratio as ``compare.json`` holds it: None for what too few pairs do not give."""
    ratio = compute_paired_ratio(ours, reference)
    mean, low, high = (None if math.isnan(value) else value for value in (ratio.mean, ratio.low, ratio.high))
    return {"ratio": mean, "low": low, "high": high, "pairs": ratio.n}


def summarize_arms(
    arms: Sequence[str], results: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int], metric: str,
    target: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Build one row an arm: spread over seeds, and ratios to the first arm on the same seeds."""
    facts = {
        key: {**summarize_curve(result["evals"], metric, target), **_sum_costs(result)}
        for key, result in results.items()
    }
    rows = []
    for arm in arms:
        mine = {seed: facts[arm, seed] for seed in seeds if (arm, seed) in facts}
        pairs = [seed for seed in mine if (arms[0], seed) in facts]
        row: dict[str, Any] = {"arm": arm, "seeds": {str(seed): fact for seed, fact in mine.items()}}
        for name in ("area", "final"):
            values = [fact[name] for fact in mine.values()]
            row[name] = {"mean": _mean_known(values), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
            row[f"{name}_ratio"] = estimate_paired_ratio(
                [mine[seed][name] for seed in pairs], [facts[arms[0], seed][name] for seed in pairs]
            )
        reached = [seed for seed in pairs if not (mine[seed]["censored"] or facts[arms[0], seed]["censored"])]
        row["tokens_to_target"] = _mean_known(
            [fact["tokens_to_target"] for fact in mine.values() if not fact["censored"]]
        )
        row["censored"] = sum(fact["censored"] for fact in mine.values())
        # Only pairs in which both arrived: a censored run has no number, and leaving it out flatters the slower arm.
        row["tokens_ratio"] = estimate_paired_ratio(
            [mine[seed]["tokens_to_target"] for seed in reached],
            [facts[arms[0], seed]["tokens_to_target"] for seed in reached],
        )
        rows.append(row)
    return rows


def _sum_costs(result: Mapping[str, Any]) -> dict[str, Any]:
    names = ("tokens", "teacher_calls", "teacher_tokens", "teacher_entries", "teacher_bytes", "clipped", "truncated")
    last = result["evals"][-1]
    facts: dict[str, Any] = {name: result[name] for name in names}
    for name in ("forward_kl", "jsd", "agreement", "accuracy"):
        facts[name] = last.get(name)
    for prefixes in ("fresh", "teacher"):
        facts[f"{prefixes}_reverse_kl"] = last.get(prefixes, {}).get("reverse_kl")
    return facts


def _mean_known(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
