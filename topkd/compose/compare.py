"""``compare``: every arm on every seed, learning rates tuned apart, cell by cell, resumable, in one directory."""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from topkd.compose.comparison.cell import FORMER, Cell, Phase, is_superseded, read_finished, run_cell
from topkd.compose.comparison.config import EMBEDDED, Arm, CompareConfig
from topkd.compose.comparison.statistics import summarize_curve
from topkd.compose.comparison.summary import build_summary
from topkd.compose.config.run_config import save_config
from topkd.compose.data.digests import digest_contents
from topkd.compose.progress import Progress
from topkd.compose.run.folder import lock_folder
from topkd.engine.loop.metrics import make_strict_json
from topkd.report.load.run_folder import CELLS, COMPARISON, CONFIG, name_cell
from topkd.topk.errors import ConfigError, TrainingError


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison: its directory and what ``compare.json`` holds."""

    out: Path
    summary: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Every cell finished and every arm's learning rate is inside its grid."""
        return not self.summary["failed"] and not self.summary["refused"]


def compare(config: CompareConfig, out: Path, progress: Progress | None = None) -> Comparison:
    """Run what is missing of a comparison; a second call continues where the first one stopped."""
    progress = progress or Progress()
    _check_free(config, out)
    with lock_folder(out):
        save_config(config, out / CONFIG)
        return _run_comparison(config, out, progress)


def _run_comparison(config: CompareConfig, out: Path, progress: Progress) -> Comparison:
    if config.base == EMBEDDED:
        from topkd.compose.demo_assets.assets import build_assets, cache_root

        build_assets(cache_root(), progress)  # once, before workers would all train the same models
    with _Workers(config, out / CELLS, progress) as workers:
        tuned, tables = _tune_rates(config, workers)
        live = [_build_cell(config, arm, seed, tuned[arm.name], "live") for arm in config.arms for seed in config.seeds]
        results = workers.finish("live runs", live)
        replayed = []
        if config.replay:
            drawn = {cell.id: cell.digest for cell in live}
            replayed = [
                _build_cell(config, arm, seed, tuned[arm.name], "replay", drawn=drawn)
                for arm in config.arms
                for seed in config.seeds
            ]
            results |= workers.finish("matched replays", replayed)
    summary = build_summary(config, tables, [*live, *replayed], results)
    staging = out / f".{COMPARISON}.partial"
    staging.write_text(json.dumps(make_strict_json(summary), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    staging.replace(out / COMPARISON)
    return Comparison(out, summary)


class _Workers:
    """Processes that train cells; finished cells are read, not run."""

    def __init__(self, config: CompareConfig, cells: Path, progress: Progress) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = config.workers or cores
        self.threads = max(1, cores // self.count)
        self.cells, self.progress = cells, progress
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()

    def finish(self, stage: str, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Results by cell id, of cells run now and of those that already lay there."""
        results = {cell.id: found for cell in cells if (found := read_finished(self.cells, cell)) is not None}
        self.progress.stage(stage, len(cells))
        if results:
            self.progress.advance(len(results), "found finished")
        if former := sum(is_superseded(self.cells, cell) for cell in cells):
            self.progress.note(
                f"{former} finished cell{'s' * (former > 1)} of other settings kept in {self.cells.with_name(FORMER)}"
            )
        waiting: dict[Future[dict[str, Any]], Cell] = {
            self._submit(cell): cell for cell in cells if cell.id not in results
        }
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                cell = waiting.pop(future)
                try:
                    results[cell.id] = future.result()
                except BrokenProcessPool:
                    raise TrainingError(
                        "a worker of the comparison died", where=f"around cell {cell.id}",
                        hint="out of memory? lower workers; the same command continues with the cells that are missing",
                    ) from None  # fmt: skip
                state = results[cell.id]["error"] or f"{results[cell.id]['seconds']:.0f} s"
                self.progress.advance(len(results), f"{cell.id}: {state}")
        return results

    def _submit(self, cell: Cell) -> Future[dict[str, Any]]:
        if self._pool is None:
            # Threads of the linear algebra are fixed when a worker imports it, so by its environment.
            os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))
            self._pool = ProcessPoolExecutor(
                self.count, mp_context=multiprocessing.get_context("spawn"), initializer=_as_worker
            )
        # A worker is born with Ctrl-C held back: it could be hit before it knows to leave that to us.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(run_cell, str(self.cells), cell, self.threads)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _as_worker() -> None:
    """In a worker: Ctrl-C is the parent's to answer, and a parent that is gone, however it went, ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def follow() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="topkd-parent").start()


def _tune_rates(config: CompareConfig, workers: _Workers) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """Each arm's learning rate, and the trials it was chosen by: as many for every arm."""
    if config.tuning is None:
        return {arm.name: None for arm in config.arms}, {}
    rates = list(config.tuning.rates)
    for extension in range(config.tuning.extensions + 1):
        cells = {
            (arm.name, rate, seed): _build_cell(config, arm, seed, rate, "tune")
            for arm in config.arms
            for rate in rates
            for seed in config.tuning.seeds
        }
        results = workers.finish("tuning" if not extension else "tuning, wider", list(cells.values()))
        tables = {
            arm.name: _run_trials(
                arm, rates, [[results[cells[arm.name, r, s].id] for s in config.tuning.seeds] for r in rates], config
            )
            for arm in config.arms
        }
        low = any(table["edge"] == "low" for table in tables.values())
        high = any(table["edge"] == "high" for table in tables.values())
        if not (low or high) or extension == config.tuning.extensions:
            break
        step = rates[1] / rates[0]
        rates = [_round_rate(rates[0] / step)] * low + rates + [_round_rate(rates[-1] * step)] * high
    return {name: table["best"] for name, table in tables.items()}, tables


def _run_trials(
    arm: Arm, rates: Sequence[float], results: Sequence[Sequence[Mapping[str, Any]]], config: CompareConfig
) -> dict[str, Any]:
    areas = []
    for per_seed in results:
        facts = [
            summarize_curve(result["evals"], config.metric, config.target)["area"]
            if result["status"] == "done"
            else None
            for result in per_seed
        ]
        # A rate at which one trial broke is not a rate to choose.
        areas.append(sum(facts) / len(facts) if None not in facts else None)  # type: ignore[arg-type]
    able = [(area, i) for i, area in enumerate(areas) if area is not None and not math.isnan(area)]
    if not able:
        raise TrainingError(
            "no learning rate finished", where=f"arm {arm.name!r}",
            got=results[0][0]["error"] or f"no finite {config.metric}", hint="lower tuning.rates",
        )  # fmt: skip
    _, best = min(able)
    edge = "low" if best == 0 else "high" if best == len(rates) - 1 else ""
    return {"rates": list(rates), "areas": areas, "best": rates[best], "edge": edge}


def _build_cell(
    config: CompareConfig,
    arm: Arm,
    seed: int,
    lr: float | None,
    phase: Phase,
    *,
    drawn: Mapping[str, str] | None = None,
) -> Cell:
    """``drawn``: for a replay, the live cells' digests by their ids."""
    rollouts = ""
    if config.replay and phase != "tune":
        reference = config.arms[0].name
        if phase == "replay" or arm.name == reference:
            rollouts = name_cell("live", reference, seed)
    name = name_cell(phase, arm.name, seed, lr if phase == "tune" else None)
    values, by = config.values(arm, seed, lr), "" if drawn is None else drawn[rollouts]
    inputs = "" if config.base == EMBEDDED else _digest_inputs(values)
    return Cell(name, phase, arm.name, seed, lr, config.base, values, config.probes, rollouts, by, inputs)


def _digest_inputs(values: Mapping[str, Any]) -> str:
    """Digests of the prompts, the held-out prompts and the student that a cell's settings name."""
    named = (("data", "path"), ("eval", "path"), ("student", "model"))
    paths = [(values.get(table) or {}).get(key) for table, key in named]
    return " ".join(digest_contents(Path(path)) if path else "" for path in paths)


def _check_free(config: CompareConfig, out: Path) -> None:
    """Raises unless the folder is new or empty, or the one where some of these arms were begun."""
    try:
        begun = out.exists() and not all(entry.name.startswith(".") for entry in out.iterdir())
        lying = json.loads((out / CONFIG).read_text(encoding="utf-8")) if begun else None
    except FileNotFoundError:
        lying = {}
    except (OSError, ValueError) as error:
        raise ConfigError("cannot use the output folder", where=str(out), got=str(error)) from error
    if lying is not None:
        if not isinstance(lying, dict) or not isinstance(lying.get("arms"), list):
            raise ConfigError("the output folder holds something else", where=str(out), hint="choose another --out")
        arms = [str(arm.get("name")) for arm in lying["arms"] if isinstance(arm, dict)]
        same = (lying.get("name"), lying.get("base")) == (config.name, config.base)
        if not same or not {arm.name for arm in config.arms} & set(arms):
            raise ConfigError(
                "the output folder holds another comparison", where=str(out),
                got=f"{lying.get('name')!r} on {lying.get('base')!r}: {', '.join(arms)}", hint="choose another --out",
            )  # fmt: skip


def _round_rate(rate: float) -> float:
    return float(f"{rate:.3g}")
