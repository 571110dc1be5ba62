"""The cells of a comparison as runs: of a finished one as its ``compare.json`` lists them, else as they lie there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topkd.report.load.run_folder import CELLS, COMPARISON, RUN_LOG, parse_cell_name
from topkd.report.load.run_log import LoggedRun, Record, flatten_settings, read_config, read_run
from topkd.topk.errors import DataError


def read_listed_cells(folder: Path, comparison: Mapping[str, Any], notes: list[str]) -> list[LoggedRun]:
    """Read the cells that a finished comparison lists; what is wrong with one goes to ``notes``."""
    cells = comparison.get("cells")
    if not isinstance(cells, list):
        raise DataError(
            "a comparison without cells", where=str(folder / COMPARISON), got=type(cells).__name__, expected="a list"
        )
    labels = _read_labels(comparison)
    runs = []
    for cell in cells:
        name = str(cell.get("id", "?"))
        path = folder / str(cell.get("run") or f"{CELLS}/{name}")
        if not (path / RUN_LOG).exists():
            notes.append(f"cell {name} ({cell.get('status', 'not run')}) has no run log and is left out")
            continue
        run = read_run(path, name=name)
        arm = cell.get("arm")
        # An arm is a setting by itself: the rate that its tuning found is a part of it.
        params = {"arm": labels.get(arm) or arm} if arm else cell.get("params") or {}
        run.params = {key: value for key, value in flatten_settings(params).items() if key != "seed"}
        run.replayed = cell.get("phase") == "replay"
        run.seed = cell["seed"] if isinstance(cell.get("seed"), int) else run.seed
        run.failed = cell.get("status") == "failed"
        if run.failed:
            notes.append(f"cell {name} failed; its curves end where it did, and it is in no verdict")
        runs.append(run)
    return runs


def read_unfinished_cells(folder: Path, notes: list[str]) -> list[LoggedRun]:
    """Read the cells of an unfinished comparison by their folders' names; tuning trials only until others run."""
    labels = _read_labels(read_config(folder))
    found = []
    for run_log in sorted((folder / CELLS).glob(f"*/{RUN_LOG}")):
        run = read_run(run_log.parent)
        phase, arm, rate = parse_cell_name(run.name, labels)
        run.params = {"arm": labels.get(arm, arm)} | ({"lr": float(rate)} if rate else {})
        run.replayed = phase == "replay"
        found.append((phase, run))
    runs = [run for phase, run in found if phase != "tune"]
    trials = len(found) - len(runs)
    note = f"the comparison in {folder.resolve().name} is not finished: its cells so far, and no verdict of its own"
    if runs and trials:
        note += f"; {trials} tuning trials are left out"
    notes.append(note if runs or not trials else f"{note}; all of them are trials of learning rates")
    return runs or [run for _, run in found]


def count_cells(folder: Path) -> tuple[int, bool]:
    """Count a comparison's cells that have a run log; also return whether it is finished."""
    return sum(1 for _ in (folder / CELLS).glob(f"*/{RUN_LOG}")), (folder / COMPARISON).exists()


def _read_labels(record: Record | Mapping[str, Any]) -> dict[Any, Any]:
    """Return the label of each arm that has one."""
    arms = record.get("arms")
    return {arm.get("name"): arm.get("label") or arm.get("name") for arm in arms or () if isinstance(arm, dict)}
