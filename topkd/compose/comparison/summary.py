"""A comparison's verdict in words: who learnt fastest, who ends lowest, and what the paired seeds cannot tell."""

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
from topkd.compose.comparison.statistics import estimate_paired_ratio, summarize_arms
from topkd.report.analysis.formatting import NAMES


def state_verdict(
    rows: Sequence[Mapping[str, Any]], shown: Mapping[str, str], metric: str, controls: Container[str] = ()
) -> dict[str, Any]:
    """Which arm learnt fastest (the smallest area) and which ends lowest, as far as paired seeds tell it.

    ``text`` is about the area, ``ends`` about the last values. ``winner`` needs the smallest area beyond its spread,
    and no other arm that clearly ends lower: where the two disagree, ``text`` names both and nobody has won.
    ``controls`` are ranked nowhere; ``ends`` closes with what each came to beside the best of the others.
    """
    whole = [row for row in rows if all(_keep_known(row[name]["mean"]) for name in ("area", "final"))]
    able = [row for row in whole if row["arm"] not in controls]
    left = [shown[row["arm"]] for row in rows if row not in whole]
    wanting = f" Not ranked, for want of a whole curve: {', '.join(left)}." if left else ""
    if len(able) < 2:
        beside = [_describe_beside(row, able[0], shown) for row in whole if row["arm"] in controls] if able else []
        few = "Controls aside, fewer" if any(row["arm"] in controls for row in rows) else "Fewer"
        text = f"{few} than two arms finished: nothing to compare.{wanting}"
        return {"winner": None, "text": text, "ends": " ".join(beside)}
    area, final = _rank_arms(able, "area"), _rank_arms(able, "final")
    statement: dict[str, Any] = {"winner": None, "best": area.best, "against": area.against, "lowest_end": final.best}
    best, end, curve = shown[area.best], shown[final.best], f"area under {NAMES.get(metric, metric)}"
    behind = next((entry for entry in final.against if entry["arm"] == area.best), None)
    nearest = area.against[0]
    if not nearest["pairs"]:
        text = (
            f"{best} has the smallest {curve}, but no seed in common with {shown[nearest['arm']]}: nothing pairs them."
        )
    elif nearest["high"] is None:
        text = f"{best} has the smallest {curve} on the one seed there is: a single pair shows no spread."
    elif area.tied:
        tied = _all(area.tied, shown)
        text = f"No clear winner: {best} has the smallest {curve}, but paired seeds do not tell it from {tied}."
    elif behind is not None and behind["clear"]:
        text = (
            f"Divided: {best} learns faster, with an {curve} of {_describe_first(area, shown)}; "
            f"{end} ends lower, with a last value of {_format_interval(behind)} of {best}'s."
        )
    else:
        statement["winner"] = area.best
        text = f"{best} wins: its {curve} is {_describe_first(area, shown)}{_describe_rest(area)}."
    first = next(row for row in able if row["arm"] == area.best)
    yardsticks = [_describe_beside(row, first, shown) for row in whole if row["arm"] in controls]
    return statement | {
        "text": text + wanting,
        "ends": " ".join([_describe_ends(area, final, behind, shown), *yardsticks]),
    }


@dataclass(frozen=True, slots=True)
class _Ranking:
    """The arm that is best by a fact, and its paired ratio to each other arm, the nearest first."""

    best: str
    against: list[dict[str, Any]]

    @property
    def tied(self) -> list[dict[str, Any]]:
        return [entry for entry in self.against if not entry["clear"]]


def _rank_arms(rows: Sequence[Mapping[str, Any]], name: str) -> _Ranking:
    """Ranked over the seeds that all arms have: a seed that an arm lacks moves nobody else's mean."""
    common = set.intersection(*(set(row["seeds"]) for row in rows))

    def mean(row: Mapping[str, Any]) -> float:
        return float(np.mean([fact[name] for seed, fact in row["seeds"].items() if seed in common or not common]))

    best, *others = sorted(rows, key=mean)
    against = []
    for other in others:
        ratio = _describe_paired(best, other, name)
        against.append({"arm": other["arm"], **ratio, "clear": ratio["high"] is not None and ratio["high"] < 1.0})
    return _Ranking(best["arm"], against)


def _describe_ends(area: _Ranking, final: _Ranking, behind: Mapping[str, Any] | None, shown: Mapping[str, str]) -> str:
    """What the last values say, in words that fit what was said of the areas."""
    who = shown[final.best] if behind is not None else f"{shown[final.best]} also"
    if final.against[0]["high"] is None:
        return f"{who} ends lowest, {'on that one seed' if final.against[0]['pairs'] else 'unpaired as well'}."
    if not final.tied:
        return f"{who} ends lowest: its last value is {_describe_first(final, shown)}{_describe_rest(final)}."
    doubt = f"{who} ends lowest, but paired seeds do not tell its last value from those of {_all(final.tied, shown)}."
    if behind is not None and behind["clear"] and area.tied:
        return f"{doubt} It is {_format_interval(behind)} of {shown[area.best]}'s."
    return doubt


def _describe_beside(control: Mapping[str, Any], best: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    area, final = (_format_interval(_describe_paired(control, best, name)) for name in ("area", "final"))
    name, other = shown[control["arm"]], shown[best["arm"]]
    return f"{name}, a control, has an area of {area} of {other}'s, and a last value of {final}."


def _describe_paired(main_side: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, Any]:
    seeds = [seed for seed in main_side["seeds"] if seed in other["seeds"]]
    return estimate_paired_ratio([main_side["seeds"][s][name] for s in seeds], [other["seeds"][s][name] for s in seeds])


def _all(entries: Sequence[Mapping[str, Any]], shown: Mapping[str, str]) -> str:
    return " and ".join(f"{shown[entry['arm']]}, ratio {_format_interval(entry)}" for entry in entries)


def _describe_first(ranking: _Ranking, shown: Mapping[str, str]) -> str:
    runner_up = ranking.against[0]
    return f"{_format_interval(runner_up)} of the runner-up's, {shown[runner_up['arm']]}"


def _describe_rest(ranking: _Ranking) -> str:
    return ", and below every other arm's on paired seeds" if len(ranking.against) > 1 else ""


def _format_interval(ratio: Mapping[str, Any]) -> str:
    if ratio["ratio"] is None:
        return "unknown (no pair)"
    span = "one pair" if ratio["low"] is None else f"{ratio['low']:.3f} to {ratio['high']:.3f}"
    return f"{ratio['ratio']:.3f} ({span})"


def _keep_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def build_summary(
    config: CompareConfig,
    tables: Mapping[str, Mapping[str, Any]],
    cells: Iterable[Cell],
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What ``compare.json`` holds: the arms with their rates, every cell, paired statistics, the verdict.

    Args:
        config: The comparison.
        tables: Arm -> its tuning trials; empty when nothing was tuned.
        cells: The cells of the comparison itself.
        results: Cell id -> its result.
    """
    cells = list(cells)
    shown = {arm.name: arm.shown for arm in config.arms}
    refused = [
        f"{shown[name]}: best learning rate {table['best']:g} is the grid's {table['edge']}est tried"
        for name, table in tables.items()
        if table["edge"]
    ]
    phases: dict[str, dict[str, Any]] = {}
    for phase in ("live", "replay") if config.replay else ("live",):
        done = {
            (cell.arm, cell.seed): results[cell.id]
            for cell in cells
            if cell.phase == phase and results[cell.id]["status"] == "done"
        }
        rows = summarize_arms([arm.name for arm in config.arms], done, config.seeds, config.metric, config.target)
        statement = state_verdict(rows, shown, config.metric, {arm.name for arm in config.arms if arm.control})
        if refused:  # an arm that was not tuned makes every ranking that it is in worthless
            statement |= {"winner": None, "text": f"No verdict: {'; '.join(refused)}. Widen tuning.rates.", "ends": ""}
        phases[phase] = {"arms": rows, "verdict": statement}
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
            {**arm.model_dump(), "label": arm.shown, "lr": tables[arm.name]["best"] if tables else None}
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
        "live": phases["live"],
        "replay": phases.get("replay"),
        "verdict": phases["live"]["verdict"],
    }
