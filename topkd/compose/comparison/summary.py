"""A comparison's summary: every cell, paired statistics, and which arm learnt fastest and ends lowest."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

import topkd
from topkd.compose.comparison.cell import Cell
from topkd.compose.comparison.config import CompareConfig
from topkd.report.analysis.formatting import NAMES
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
    """Compute the paired ratio for ``compare.json``; a value that needs more pairs is None."""
    ratio = compute_paired_ratio(ours, reference)
    mean, low, high = (None if math.isnan(value) else value for value in (ratio.mean, ratio.low, ratio.high))
    return {"ratio": mean, "low": low, "high": high, "pairs": ratio.n}


def summarize_arms(
    arms: Sequence[str], results: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int], metric: str,
    target: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Build one row per arm: spread over seeds, and ratios to the first arm on the same seeds."""
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
        # Only pairs in which both reached the target: a censored run has no number. This flatters the slower arm.
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


# Two verdicts that answer different questions: a report (topkd.report.analysis.verdict) ranks any runs by the paired
# difference of their last values. A comparison has whole curves over equal tokens on paired seeds, and judges by the
# paired ratio of the areas under them. A report of a comparison shows this verdict in place of its own.
def judge_arms(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], metric: str, controls: Container[str] = ()
) -> dict[str, Any]:
    """Judge which arm learnt fastest (smallest area) and which ends lowest, as far as paired seeds can tell.

    ``text`` is about the area, ``ends`` about the last values. ``winner`` needs the smallest area beyond its spread,
    and no other arm that clearly ends lower: where the two disagree, ``text`` names both and there is no winner.
    ``controls`` are not ranked; ``ends`` closes with their ratio to the best of the other arms.
    """
    complete = [row for row in rows if all(_is_known(row[name]["mean"]) for name in ("area", "final"))]
    ranked = [row for row in complete if row["arm"] not in controls]
    measured_controls = [row for row in complete if row["arm"] in controls]
    unranked = [labels[row["arm"]] for row in rows if row not in complete]
    remark = f" Not ranked, because their curves are incomplete: {', '.join(unranked)}." if unranked else ""
    if len(ranked) < 2:
        ends = [_describe_control(row, ranked[0], labels) for row in measured_controls] if ranked else []
        few = "Controls aside, fewer" if any(row["arm"] in controls for row in rows) else "Fewer"
        text = f"{few} than two arms finished: nothing to compare.{remark}"
        return {"winner": None, "text": text, "ends": " ".join(ends)}
    area, final = _rank_arms(ranked, "area"), _rank_arms(ranked, "final")
    behind = next((entry for entry in final.against if entry["arm"] == area.best), None)
    winner, text = _describe_areas(area, final, behind, labels, f"area under {NAMES.get(metric, metric)}")
    best = next(row for row in ranked if row["arm"] == area.best)
    ends = [_describe_ends(area, final, behind, labels)]
    ends += [_describe_control(row, best, labels) for row in measured_controls]
    return {
        "winner": winner, "best": area.best, "against": area.against, "lowest_end": final.best,
        "text": text + remark, "ends": " ".join(ends),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Ranking:
    """The best arm by one statistic, and its paired ratio to each other arm, the nearest first."""

    best: str
    against: list[dict[str, Any]]

    @property
    def tied(self) -> list[dict[str, Any]]:
        return [entry for entry in self.against if not entry["clear"]]


def _rank_arms(rows: Sequence[Mapping[str, Any]], name: str) -> _Ranking:
    """Rank arms over the seeds that all of them have, so that all means are over the same seeds."""
    common = set.intersection(*(set(row["seeds"]) for row in rows))

    def mean(row: Mapping[str, Any]) -> float:
        return float(np.mean([fact[name] for seed, fact in row["seeds"].items() if seed in common or not common]))

    best, *others = sorted(rows, key=mean)
    against = []
    for other in others:
        ratio = _pair_arms(best, other, name)
        against.append({"arm": other["arm"], **ratio, "clear": ratio["high"] is not None and ratio["high"] < 1.0})
    return _Ranking(best["arm"], against)


def _describe_areas(
    area: _Ranking, final: _Ranking, behind: Mapping[str, Any] | None, labels: Mapping[str, str], curve: str
) -> tuple[str | None, str]:
    """Return the winner, or None, and the sentence about the areas.

    Args:
        area: Ranking by the area.
        final: Ranking by the last value.
        behind: Ratio of the lowest last value to that of the arm with the smallest area; None if it is the same arm.
        labels: Arm -> its label.
        curve: Name of the area.
    """
    best, nearest = labels[area.best], area.against[0]
    if not nearest["pairs"]:
        return None, f"{best} has the smallest {curve}, but no seed in common with {labels[nearest['arm']]}: no pairs."
    if nearest["high"] is None:
        return None, f"{best} has the smallest {curve} on the only seed: a single pair has no spread."
    if area.tied:
        tied = _list_ratios(area.tied, labels)
        return None, f"No clear winner: {best} has the smallest {curve}; paired seeds do not separate it from {tied}."
    if behind is not None and behind["clear"]:
        return None, (
            f"Divided: {best} learns faster, with an {curve} of {_describe_first(area, labels)}; "
            f"{labels[final.best]} ends lower, with a last value of {_format_interval(behind)} of {best}'s."
        )
    return area.best, f"{best} wins: its {curve} is {_describe_first(area, labels)}{_describe_rest(area)}."


def _describe_ends(area: _Ranking, final: _Ranking, behind: Mapping[str, Any] | None, labels: Mapping[str, str]) -> str:
    """Describe the last values, in words that fit the sentence about the areas."""
    who = labels[final.best] if behind is not None else f"{labels[final.best]} also"
    if final.against[0]["high"] is None:
        return f"{who} ends lowest, {'on that seed' if final.against[0]['pairs'] else 'without a pair as well'}."
    if not final.tied:
        return f"{who} ends lowest: its last value is {_describe_first(final, labels)}{_describe_rest(final)}."
    tied = _list_ratios(final.tied, labels)
    doubt = f"{who} ends lowest, but paired seeds do not separate its last value from those of {tied}."
    if behind is not None and behind["clear"] and area.tied:
        return f"{doubt} It is {_format_interval(behind)} of {labels[area.best]}'s."
    return doubt


def _describe_control(control: Mapping[str, Any], best: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    area, final = (_format_interval(_pair_arms(control, best, name)) for name in ("area", "final"))
    name, other = labels[control["arm"]], labels[best["arm"]]
    return f"{name}, a control, has an area of {area} of {other}'s, and a last value of {final}."


def _pair_arms(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> dict[str, Any]:
    seeds = [seed for seed in first["seeds"] if seed in second["seeds"]]
    return estimate_paired_ratio([first["seeds"][s][name] for s in seeds], [second["seeds"][s][name] for s in seeds])


def _list_ratios(entries: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    return " and ".join(f"{labels[entry['arm']]}, ratio {_format_interval(entry)}" for entry in entries)


def _describe_first(ranking: _Ranking, labels: Mapping[str, str]) -> str:
    runner_up = ranking.against[0]
    return f"{_format_interval(runner_up)} of the runner-up's, {labels[runner_up['arm']]}"


def _describe_rest(ranking: _Ranking) -> str:
    return ", and below every other arm's on paired seeds" if len(ranking.against) > 1 else ""


def _format_interval(ratio: Mapping[str, Any]) -> str:
    if ratio["ratio"] is None:
        return "unknown (no pair)"
    span = "one pair" if ratio["low"] is None else f"{ratio['low']:.3f} to {ratio['high']:.3f}"
    return f"{ratio['ratio']:.3f} ({span})"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def build_summary(
    config: CompareConfig,
    tables: Mapping[str, Mapping[str, Any]],
    cells: Iterable[Cell],
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Build the contents of ``compare.json``: arms with their rates, every cell, paired statistics, the verdict.

    Args:
        config: The comparison.
        tables: Arm -> its tuning trials; empty when nothing was tuned.
        cells: The cells of the comparison itself.
        results: Cell id -> its result.
    """
    cells = list(cells)
    labels = {arm.name: arm.display_name for arm in config.arms}
    refused = [
        f"{labels[name]}: best learning rate {table['best']:g} is the {table['edge']}est that was tried"
        for name, table in tables.items()
        if table["edge"]
    ]
    live = _summarize_phase(config, "live", cells, results, refused)
    return {
        "name": config.name,
        "note": config.note,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "topkd": topkd.__version__,
        "base": config.base,
        "metric": config.metric,
        "target": config.target,
        "reference": config.arms[0].name,
        "seeds": list(config.seeds),
        "arms": [
            {**arm.model_dump(), "label": arm.display_name, "lr": tables[arm.name]["best"] if tables else None}
            for arm in config.arms
        ],
        "tuning": dict(tables),
        "tuned": None if config.tuning is None else config.tuning.model_dump(mode="json"),
        "refused": refused,
        "failed": {cell.id: results[cell.id]["error"] for cell in cells if results[cell.id]["status"] != "done"},
        "cells": [
            {
                "id": cell.id,
                "phase": cell.phase,
                "arm": cell.arm,
                "seed": cell.seed,
                "params": {"arm": cell.arm, "lr": cell.lr},
                "run": f"cells/{cell.id}",
                "status": results[cell.id]["status"],
            }
            for cell in cells
        ],
        "live": live,
        "replay": _summarize_phase(config, "replay", cells, results, refused) if config.replay else None,
        "verdict": live["verdict"],
    }


def _summarize_phase(
    config: CompareConfig,
    phase: str,
    cells: Sequence[Cell],
    results: Mapping[str, Mapping[str, Any]],
    refused: Sequence[str],
) -> dict[str, Any]:
    finished = {
        (cell.arm, cell.seed): results[cell.id]
        for cell in cells
        if cell.phase == phase and results[cell.id]["status"] == "done"
    }
    rows = summarize_arms([arm.name for arm in config.arms], finished, config.seeds, config.metric, config.target)
    labels, controls = (
        {arm.name: arm.display_name for arm in config.arms},
        {arm.name for arm in config.arms if arm.control},
    )
    verdict = judge_arms(rows, labels, config.metric, controls)
    if refused:  # a ranking with an arm whose rate is not tuned is worthless
        verdict |= {"winner": None, "text": f"No verdict: {'; '.join(refused)}. Widen tuning.rates.", "ends": ""}
    return {"arms": rows, "verdict": verdict}
