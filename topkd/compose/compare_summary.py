"""What a finished comparison says, as one JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import topkd
from topkd.compose.compare_cell import Cell
from topkd.compose.compare_config import CompareConfig
from topkd.compose.compare_stats import arm_summaries
from topkd.compose.compare_verdict import verdict


def summarised(
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
        rows = arm_summaries([arm.name for arm in config.arms], done, config.seeds, config.metric, config.target)
        said = verdict(rows, shown, config.metric, {arm.name for arm in config.arms if arm.control})
        if refused:  # an arm that was not tuned makes every ranking that it is in worthless
            said |= {"winner": None, "text": f"No verdict: {'; '.join(refused)}. Widen tuning.rates.", "ends": ""}
        phases[phase] = {"arms": rows, "verdict": said}
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
