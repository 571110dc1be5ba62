"""The runs of a page: one, several, or a comparison. Runs that differ only in their seed form one group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topkd.report.load.run_folder import CELLS, COMPARISON, RUN_LOG, parse_cell_name
from topkd.report.load.run_log import LoggedRun, Record, flatten_settings, read_config, read_object, read_run
from topkd.topk.errors import DataError

# Settings that do not distinguish groups: the seed, folders, and the client.
_PLACES = ("seed", "cache.path", "out", "client.")
_FIRST = ("objective.kind", "objective.divergence", "objective.beta", "k", "objective.lam")


@dataclass(slots=True)
class RunGroup:
    """Runs with one setting; they share a colour on the page."""

    label: str
    settings: dict[str, Any]
    runs: list[LoggedRun]

    @property
    def replayed(self) -> bool:
        """Whether the runs trained on rollouts of other runs. Such a group is shown, but not ranked."""
        return self.runs[0].replayed

    @property
    def foreign(self) -> bool:
        """Whether a run trained on completions that its student did not sample."""
        return any(run.foreign for run in self.runs)


@dataclass(slots=True)
class Collection:
    """All runs of a page, and the ``compare.json`` of their comparison, if they are of a finished one."""

    title: str
    runs: list[LoggedRun]
    comparison: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unfinished: bool = False

    @property
    def controls(self) -> frozenset[str]:
        """Labels of the comparison's control arms, which cannot win."""
        arms = [arm for arm in self.comparison.get("arms") or () if isinstance(arm, dict) and arm.get("control")]
        return frozenset(str(arm.get("label") or arm.get("name")) for arm in arms)

    def groups(self) -> list[RunGroup]:
        """Group the runs by setting, in the order of their first run."""
        is_replayed = [run.replayed or run.foreign for run in self.runs]
        settings = [
            (dict(run.params) or flatten_settings(run.config))
            | ({"rollouts": "replay" if replays else "live"} if any(is_replayed) else {})
            for run, replays in zip(self.runs, is_replayed, strict=True)
        ]
        differing = [key for key in find_differing_keys(settings) if not key.startswith(_PLACES)]
        # Settings of a comparison's arms count even if they have one value only; a single group has no such settings.
        by_key: dict[str, list[int]] = {}
        for index, setting in enumerate(settings):
            by_key.setdefault(json.dumps([setting.get(key) for key in differing], default=str), []).append(index)
        members = list(by_key.values())
        distinct = [{key: settings[indices[0]].get(key) for key in differing} for indices in members]
        return [
            RunGroup(label, setting, [self.runs[index] for index in indices])
            for label, setting, indices in zip(_label_groups(distinct, self), distinct, members, strict=True)
        ]


def gather(paths: Sequence[Path], *, waiting: bool = False) -> Collection:
    """Read the runs and the comparison in some folders."""
    runs: list[LoggedRun] = []
    comparison: dict[str, Any] = {}
    notes: list[str] = []
    title, unfinished = "", False
    for path in paths:
        if (path / COMPARISON).exists():
            if comparison:
                raise DataError("two comparisons on one page", where=str(path), hint="make one page for each")
            comparison = read_object(path / COMPARISON)
            runs += read_listed_cells(path, comparison, notes)
        elif (path / "cells").is_dir():
            runs += read_unfinished_cells(path, notes) or ([read_run(path, waiting=True)] if waiting else [])
            title, unfinished = str(read_config(path).get("name") or title), True
        else:
            runs.append(read_run(path, waiting=waiting))
    if not runs:
        raise DataError("nothing to report", where=", ".join(map(str, paths)), got="no run with a run log")
    _disambiguate_names(runs)
    title = str(comparison.get("name") or title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"))
    return Collection(title, runs, comparison, notes, unfinished)


def read_listed_cells(folder: Path, comparison: Mapping[str, Any], notes: list[str]) -> list[LoggedRun]:
    """Read the cells that a finished comparison lists; add a note for each cell that failed or has no run log."""
    cells = comparison.get("cells")
    if not isinstance(cells, list):
        where, got = str(folder / COMPARISON), type(cells).__name__
        raise DataError("the comparison lists no cells", where=where, got=got, expected="a list")
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
        # The arm is the setting: it includes the learning rate that its tuning has chosen.
        params = {"arm": labels.get(arm) or arm} if arm else cell.get("params") or {}
        run.params = {key: value for key, value in flatten_settings(params).items() if key != "seed"}
        run.replayed = cell.get("phase") == "replay"
        run.seed = cell["seed"] if isinstance(cell.get("seed"), int) else run.seed
        run.failed = cell.get("status") == "failed"
        if run.failed:
            notes.append(f"cell {name} failed: its curves end early, and no verdict uses it")
        runs.append(run)
    return runs


def read_unfinished_cells(folder: Path, notes: list[str]) -> list[LoggedRun]:
    """Read the cells of an unfinished comparison by folder name; tuning trials only if there are no other cells."""
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
    note = f"the comparison in {folder.resolve().name} is not finished: it has no verdict yet"
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


def find_differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Find keys whose values differ (absent counts as a value), the most informative first."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    missing = object()
    first = settings[0] if settings else {}
    differing = [key for key in keys if any(config.get(key, missing) != first.get(key, missing) for config in settings)]
    return sorted(differing, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))


def _label_groups(settings: Sequence[dict[str, Any]], collection: Collection) -> list[str]:
    """Write a label for each group: a short list of the settings that distinguish the groups."""
    if len(settings) == 1:
        run = collection.runs[0]
        kind = run.params.get("objective.kind") or flatten_settings(run.config).get("objective.kind")
        return [str(kind or run.name)]
    chosen: list[str] = []
    distinct = 1
    for key in settings[0]:
        seen = len({json.dumps([config.get(name) for name in [*chosen, key]], default=str) for config in settings})
        if seen > distinct:
            chosen, distinct = [*chosen, key], seen
    texts = [[_format_value(key, config[key]) for key in chosen if config[key] is not None] for config in settings]
    return [", ".join(part for part in parts if part) or "default" for parts in texts]


def _format_value(key: str, value: Any) -> str:
    last = key.rsplit(".", 1)[-1]
    if last in ("kind", "name", "objective", "arm", "divergence"):
        return str(value)
    if last == "rollouts":
        return "" if value == "live" else "replayed"
    return f"{last} {value:g}" if isinstance(value, float) else f"{last} {value}"


def _disambiguate_names(runs: Sequence[LoggedRun]) -> None:
    """Put the parent folder's name before the names of runs that share one."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
