"""``compare``: train every arm on every seed; a second call continues where the first one stopped."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from topkd.compose.comparison.cell import FORMER, Cell, Phase, is_superseded, read_finished, run_cell
from topkd.compose.comparison.config import EMBEDDED, Arm, CompareConfig
from topkd.compose.comparison.summary import build_summary, summarize_curve
from topkd.compose.config.functions import find_source_file, load_function
from topkd.compose.config.run_config import save_config
from topkd.compose.data.digests import digest_contents
from topkd.compose.progress import Progress
from topkd.compose.run.folder import lock_folder
from topkd.engine.config.objectives import find_kind_tag
from topkd.engine.loop.metrics import make_strict_json
from topkd.files import write_atomically
from topkd.report.load.run_folder import CELLS, COMPARISON, CONFIG, name_cell
from topkd.topk.errors import ConfigError, TrainingError


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison: its folder and the contents of ``compare.json``."""

    out: Path
    summary: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every cell finished, and no arm's best learning rate is the first or the last of the grid."""
        return not self.summary["failed"] and not self.summary["refused"]


def compare(config: CompareConfig, out: str | Path, progress: Progress | None = None) -> Comparison:
    """Run the cells of a comparison that ``out`` lacks, and compare all cells.

    A second call continues where the first one stopped.
    """
    progress, out = progress or Progress(), Path(out)
    _check_output_folder(config, out)
    with lock_folder(out):
        save_config(config, out / CONFIG)
        return _run_comparison(config, out, progress)


def _run_comparison(config: CompareConfig, out: Path, progress: Progress) -> Comparison:
    if config.base == EMBEDDED:
        from topkd.compose.demo_assets.assets import build_assets, cache_root

        build_assets(cache_root(), progress)  # here, once; else every worker would train the same models
    with _Workers(config, out / CELLS, progress) as workers:
        tuned, tables = _tune_rates(config, workers)
        live = [_build_cell(config, arm, seed, tuned[arm.name], "live") for arm in config.arms for seed in config.seeds]
        results = workers.finish("live runs", live)
        replayed = []
        if config.replay:
            live_digests = {cell.id: cell.digest for cell in live}
            replayed = [
                _build_cell(config, arm, seed, tuned[arm.name], "replay", live_digests=live_digests)
                for arm in config.arms
                for seed in config.seeds
            ]
            results |= workers.finish("matched replays", replayed)
    summary = build_summary(config, tables, [*live, *replayed], results)
    write_atomically(out / COMPARISON, json.dumps(make_strict_json(summary), indent=1, allow_nan=False) + "\n")
    return Comparison(out, summary)


class _Workers:
    """Processes that train cells."""

    def __init__(self, config: CompareConfig, cells: Path, progress: Progress) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = config.workers or cores
        self.threads = max(1, cores // self.count)
        self.cells, self.progress = cells, progress
        self._pool: ProcessPoolExecutor | None = None
        self._processes: set[BaseProcess] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in self._processes:
                process.terminate()

    def finish(self, stage: str, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Run the cells that are not finished, and return the results of all by cell id."""
        results = {cell.id: result for cell in cells if (result := read_finished(self.cells, cell)) is not None}
        self.progress.stage(stage, len(cells))
        if results:
            self.progress.advance(len(results), "finished before")
        if superseded := sum(is_superseded(self.cells, cell) for cell in cells):
            cells_kept = f"{superseded} finished cell{'s' * (superseded > 1)}"
            self.progress.note(f"{cells_kept} with other settings kept in {self.cells.with_name(FORMER)}")
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
                        "a worker of the comparison died", where=f"cell {cell.id}, or one that ran at the same time",
                        hint="out of memory? lower workers; the same command continues with the cells that are missing",
                    ) from None  # fmt: skip
                state = results[cell.id]["error"] or f"{results[cell.id]['seconds']:.0f} s"
                self.progress.advance(len(results), f"{cell.id}: {state}")
        return results

    def _submit(self, cell: Cell) -> Future[dict[str, Any]]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
            )
        # The pool starts processes in ``submit``; the caller may have other child processes.
        others = set(multiprocessing.active_children()) - self._processes
        with _worker_environment(self.threads):
            future = self._pool.submit(run_cell, str(self.cells), cell, self.threads)
        self._processes |= set(multiprocessing.active_children()) - others
        return future


@contextlib.contextmanager
def _worker_environment(threads: int) -> Iterator[None]:
    """Set what new workers inherit: the number of threads, and Ctrl-C blocked. Restore the caller's afterwards.

    Linear algebra libraries read the number of threads from the environment when they are imported. Ctrl-C is blocked
    because it could reach a worker before ``_prepare_worker`` ignores it.
    """
    is_chosen = "OMP_NUM_THREADS" in os.environ
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        yield
    finally:
        if not is_chosen:
            del os.environ["OMP_NUM_THREADS"]
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _prepare_worker() -> None:
    """Ignore Ctrl-C, which the parent handles; exit when the parent has ended for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True, name="topkd-parent").start()


def _tune_rates(config: CompareConfig, workers: _Workers) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """Choose each arm's learning rate, from equally many trials for every arm; return the rates and the trials."""
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
            arm.name: _choose_rate(
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


def _choose_rate(
    arm: Arm, rates: Sequence[float], results: Sequence[Sequence[Mapping[str, Any]]], config: CompareConfig
) -> dict[str, Any]:
    areas = []
    for per_seed in results:
        trial_areas = [
            summarize_curve(result["evals"], config.metric, config.target)["area"]
            if result["status"] == "done"
            else None
            for result in per_seed
        ]
        # A rate at which a trial failed cannot be chosen.
        areas.append(sum(trial_areas) / len(trial_areas) if None not in trial_areas else None)  # type: ignore[arg-type]
    usable = [(area, i) for i, area in enumerate(areas) if area is not None and not math.isnan(area)]
    if not usable:
        raise TrainingError(
            "no learning rate finished all its trials", where=f"arm {arm.name!r}",
            got=results[0][0]["error"] or f"no finite {config.metric}", hint="lower tuning.rates",
        )  # fmt: skip
    _, best = min(usable)
    edge = "low" if best == 0 else "high" if best == len(rates) - 1 else ""
    return {"rates": list(rates), "areas": areas, "best": rates[best], "edge": edge}


def _build_cell(
    config: CompareConfig,
    arm: Arm,
    seed: int,
    lr: float | None,
    phase: Phase,
    *,
    live_digests: Mapping[str, str] | None = None,
) -> Cell:
    """Build a cell; for a replay, ``live_digests`` has the digest of each live cell by its id."""
    rollouts = ""
    if config.replay and phase != "tune":
        reference = config.arms[0].name
        if phase == "replay" or arm.name == reference:
            rollouts = name_cell("live", reference, seed)
    name = name_cell(phase, arm.name, seed, lr if phase == "tune" else None)
    values, drawn_by = config.values(arm, seed, lr), "" if live_digests is None else live_digests[rollouts]
    inputs = _digest_inputs(config, values)
    return Cell(name, phase, arm.name, seed, lr, config.base, values, config.probes, rollouts, drawn_by, inputs)


def _digest_inputs(config: CompareConfig, values: Mapping[str, Any]) -> str:
    """Digest the files that a cell's settings name: prompts, held-out prompts, student, custom objective."""
    named = (("data", "path"), ("eval", "path"), ("student", "model")) if config.base != EMBEDDED else ()
    paths = [(values.get(table) or {}).get(key) for table, key in named]
    kind = str((values.get("objective") or {}).get("kind"))
    if find_kind_tag(kind) == "custom":
        paths.append(find_source_file(load_function(kind, "objective.kind")))
    return " ".join(digest_contents(Path(path)) if path else "" for path in paths)


def _check_output_folder(config: CompareConfig, out: Path) -> None:
    """Raise ConfigError unless the folder is new, empty, or holds this comparison with at least one of these arms."""
    try:
        is_used = out.exists() and not all(entry.name.startswith(".") for entry in out.iterdir())
        stored = json.loads((out / CONFIG).read_text(encoding="utf-8")) if is_used else None
    except FileNotFoundError:
        stored = {}
    except (OSError, ValueError) as error:
        raise ConfigError("cannot use the output folder", where=str(out), got=str(error)) from error
    if stored is None:
        return
    if not isinstance(stored, dict) or not isinstance(stored.get("arms"), list):
        raise ConfigError("the output folder is not a comparison's", where=str(out), hint="choose another --out")
    arms = [str(arm.get("name")) for arm in stored["arms"] if isinstance(arm, dict)]
    is_same = (stored.get("name"), stored.get("base")) == (config.name, config.base)
    if not is_same or not {arm.name for arm in config.arms} & set(arms):
        raise ConfigError(
            "the output folder holds another comparison", where=str(out),
            got=f"{stored.get('name')!r} on {stored.get('base')!r}: {', '.join(arms)}", hint="choose another --out",
        )  # fmt: skip


def _round_rate(rate: float) -> float:
    return float(f"{rate:.3g}")
