"""From finished cells to what may be said: areas, tokens to target, paired ratios with intervals, a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom; beyond, the normal's is near enough.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def curve_facts(evals: Sequence[Mapping[str, Any]], metric: str, target: float) -> dict[str, Any]:
    """One run's curve in three numbers.

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


def paired_ratio(ours: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Geometric mean of ours / reference over pairs, with a 95 % t-interval of the mean log ratio.

    One pair has no interval: ``low`` and ``high`` are None then.
    """
    logs = np.log(np.asarray(ours, dtype=np.float64) / np.asarray(reference, dtype=np.float64))
    logs = logs[np.isfinite(logs)]
    if not logs.size:
        return {"ratio": None, "low": None, "high": None, "pairs": 0}
    mean, low, high = float(logs.mean()), None, None
    if logs.size > 1:
        quantile = _T95[logs.size - 2] if logs.size - 2 < len(_T95) else 1.96
        half = quantile * float(logs.std(ddof=1)) / math.sqrt(logs.size)
        low, high = math.exp(mean - half), math.exp(mean + half)
    return {"ratio": math.exp(mean), "low": low, "high": high, "pairs": int(logs.size)}


def arm_summaries(
    arms: Sequence[str], results: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int], metric: str,
    target: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row an arm: spread over seeds, and ratios to the first arm on the same seeds."""
    facts = {key: {**curve_facts(result["evals"], metric, target), **_costs(result)} for key, result in results.items()}
    rows = []
    for arm in arms:
        mine = {seed: facts[arm, seed] for seed in seeds if (arm, seed) in facts}
        pairs = [seed for seed in mine if (arms[0], seed) in facts]
        row: dict[str, Any] = {"arm": arm, "seeds": {str(seed): fact for seed, fact in mine.items()}}
        for name in ("area", "final"):
            values = [fact[name] for fact in mine.values()]
            row[name] = {"mean": _mean(values), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
            row[f"{name}_ratio"] = paired_ratio(
                [mine[seed][name] for seed in pairs], [facts[arms[0], seed][name] for seed in pairs]
            )
        reached = [seed for seed in pairs if not (mine[seed]["censored"] or facts[arms[0], seed]["censored"])]
        row["tokens_to_target"] = _mean([fact["tokens_to_target"] for fact in mine.values() if not fact["censored"]])
        row["censored"] = sum(fact["censored"] for fact in mine.values())
        # Only pairs in which both arrived: a censored run has no number, and leaving it out flatters the slower arm.
        row["tokens_ratio"] = paired_ratio(
            [mine[seed]["tokens_to_target"] for seed in reached],
            [facts[arms[0], seed]["tokens_to_target"] for seed in reached],
        )
        rows.append(row)
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], shown: Mapping[str, str], metric: str) -> dict[str, Any]:
    """Which arm has the smallest area, and whether its pairs against each other arm's say so beyond their spread."""
    able = [row for row in rows if row["area"]["mean"] is not None and math.isfinite(row["area"]["mean"])]
    if len(able) < 2:
        return {"winner": None, "text": "Fewer than two arms finished: nothing to compare."}
    ranked = sorted(able, key=lambda row: row["area"]["mean"])
    best = ranked[0]
    against = []
    for other in ranked[1:]:
        seeds = [seed for seed in best["seeds"] if seed in other["seeds"]]
        ratio = paired_ratio(
            [best["seeds"][seed]["area"] for seed in seeds], [other["seeds"][seed]["area"] for seed in seeds]
        )
        clear = ratio["high"] is not None and ratio["high"] < 1.0
        against.append({"arm": other["arm"], **ratio, "clear": clear})
    tied = [entry for entry in against if not entry["clear"]]
    name = shown[best["arm"]]
    if against[0]["high"] is None:
        text = f"{name} has the smallest area under {metric} on the one seed there is: a single pair shows no spread."
    elif not tied:
        text = (
            f"{name} wins: its area under {metric} is {_interval(against[0])} of the runner-up's, "
            f"{shown[against[0]['arm']]}, and below every other arm's on paired seeds."
        )
    else:
        others = ", ".join(shown[entry["arm"]] for entry in tied)
        text = f"No clear winner: {name} has the smallest area under {metric}, but its interval reaches {others}."
    if left := [shown[row["arm"]] for row in rows if row not in able]:
        text += f" Not ranked, for want of a whole curve: {', '.join(left)}."
    return {"winner": best["arm"] if not tied else None, "best": best["arm"], "against": against, "text": text}


def _interval(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _costs(result: Mapping[str, Any]) -> dict[str, Any]:
    names = ("tokens", "teacher_calls", "teacher_tokens", "teacher_entries", "teacher_bytes", "clipped", "truncated")
    last = result["evals"][-1]
    facts: dict[str, Any] = {name: result[name] for name in names}
    for name in ("forward_kl", "jsd", "agreement", "accuracy"):
        facts[name] = last.get(name)
    for prefixes in ("fresh", "teacher"):
        facts[f"{prefixes}_reverse_kl"] = last.get(prefixes, {}).get("reverse_kl")
    return facts


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
