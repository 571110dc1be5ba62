"""One cell of a comparison: one arm, one learning rate, one seed, trained in its own folder.

A cell runs in a worker process. It writes ``result.json`` last, in one rename. A cell whose folder has no
``result.json`` runs again.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from topkd.compose.comparison.config import EMBEDDED
from topkd.compose.config.run_config import RunConfig, validate_config
from topkd.compose.run.folder import lock_folder
from topkd.engine import EngineConfig
from topkd.engine.loop.metrics import make_strict_json
from topkd.files import write_atomically
from topkd.report.load.run_folder import STUDENT
from topkd.topk.errors import TopkdError

if TYPE_CHECKING:
    from topkd.compose.demo_assets.assets import Assets

FORMER = "former"  # folder for finished cells that were replaced by cells with other settings
Phase = Literal["tune", "live", "replay"]


@dataclass(frozen=True, slots=True)
class Cell:
    """The settings of a cell.

    Attributes:
        id: Name of its folder under ``cells``.
        phase: "tune" (on the tuning seeds), "live" (on-policy), or "replay" (on the rollouts of another cell).
        arm: Name of its arm.
        seed: Seed of prompts, rollouts and order.
        lr: Learning rate; None keeps the base's (no tuning).
        base: "embedded" or the base file.
        values: All settings.
        probes: Number of sequences of each kind to measure on (embedded pair only).
        rollouts_of: For a replay, the cell whose rollouts it uses; for a live cell that stores its own, its own id.
        drawn_by: For a replay, the digest of that cell: a replay of other rollouts is another cell.
        inputs: Digests of the files that a base file names; "" for the embedded pair.
    """

    id: str
    phase: Phase
    arm: str
    seed: int
    lr: float | None
    base: str
    values: Mapping[str, Any]
    probes: int
    rollouts_of: str = ""
    drawn_by: str = ""
    inputs: str = ""

    @property
    def digest(self) -> str:
        """Digest all settings that affect the result: a cell with other settings is another cell."""
        shaping = {key: value for key, value in asdict(self).items() if key not in {"drawn_by", "inputs"}}
        # Digests of finished cells on disk have the inputs as "given", and leave out either key if it is empty.
        shaping |= {key: value for key, value in (("drawn_by", self.drawn_by), ("given", self.inputs)) if value}
        return hashlib.blake2b(json.dumps(shaping, sort_keys=True).encode(), digest_size=12).hexdigest()


def read_finished(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Read the cell's result; None unless it has exactly these settings and did not fail."""
    result = _read_result(folder / cell.id)
    return result if result is not None and result.get("digest") == cell.digest else None


def _read_result(folder: Path) -> dict[str, Any] | None:
    """Read the result of a cell that did not fail, whatever its settings."""
    try:
        result: Any = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("status") == "done" else None


def is_superseded(folder: Path, cell: Cell) -> bool:
    """Return whether this cell's folder holds a finished cell with other settings, which will move to ``FORMER``."""
    return _read_result(folder / cell.id) is not None and read_finished(folder, cell) is None


def _prepare_cell_folder(cells: Path, cell: Cell) -> Path:
    """Make an empty folder for the cell; move a finished cell that is there, and delete an unfinished one."""
    folder = cells / cell.id
    with lock_folder(folder):  # fails if another process trains this cell
        former = _read_result(folder)
        if former is not None:
            kept = cells.with_name(FORMER) / f"{cell.id}-{former.get('digest', 'unknown')}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)  # it has the same settings, and so the same numbers
            folder.rename(kept)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def run_cell(cells: str, cell: Cell, threads: int) -> dict[str, Any]:
    """Train one cell in ``cells/<id>`` and return its result; after a TopkdError this is "failed", with the reason."""
    import torch

    torch.set_num_threads(threads)
    folder = _prepare_cell_folder(Path(cells), cell)
    began = time.perf_counter()
    result: dict[str, Any] = {"id": cell.id, "digest": cell.digest, "status": "done", "error": ""}
    try:
        train = _run_embedded if cell.base == EMBEDDED else _run_file
        result |= asyncio.run(train(cell, Path(cells), folder))
    except TopkdError as error:
        result |= {"status": "failed", "error": str(error)}
    result["seconds"] = time.perf_counter() - began
    write_atomically(folder / "result.json", json.dumps(make_strict_json(result), allow_nan=False) + "\n")
    return result


async def _run_embedded(cell: Cell, cells: Path, folder: Path) -> dict[str, Any]:
    from topkd.compose.comparison.embedded import Measures, RolloutRecorder, StepTeacher, read_cell_rollouts
    from topkd.compose.demo_assets.assets import choose_prompts
    from topkd.compose.run.observers import Observers
    from topkd.compose.run.run import open_claimed_run
    from topkd.compose.run.runner import TrainingParts, run_training
    from topkd.compose.run.sampler import open_in_process
    from topkd.compose.teachers.open import Teachers
    from topkd.engine.models.student import Student
    from topkd.engine.models.tokenizer import load_tokenizer

    config = validate_config(EngineConfig, cell.values, where=f"cell {cell.id}")
    assets = _load_assets()
    student, teacher = Student.load(str(assets.student), "cpu"), Student.load(str(assets.teacher), "cpu")
    rows = choose_prompts(assets.training, cell.seed)
    measures = await Measures.prepared(student, teacher, assets.held_out, cell.probes)
    scorer = StepTeacher(teacher)
    recording = RolloutRecorder(scorer.expect)
    replayed = read_cell_rollouts(cells / cell.rollouts_of, rows, scorer.expect) if cell.phase == "replay" else None
    # No stop token: every completion has its full length, so that every arm learns from equally many valid tokens.
    sampling = open_in_process(config, student, None)
    parts = TrainingParts(
        config,
        student,
        load_tokenizer(str(assets.student)),
        rows,
        Teachers({"": scorer}),
        sampling if replayed is not None else sampling.drawing_from(recording.around(sampling.sampler)),
        Observers(measures),
        source=replayed,
        is_remembered=True,
    )
    with open_claimed_run(config, folder) as run:
        result = await run_training(run, parts)
    shutil.rmtree(folder / STUDENT, ignore_errors=True)  # a comparison needs only the measurements
    if cell.rollouts_of == cell.id:
        recording.write(folder)
    return summarize_cell(config, result.steps, result.evals)


@functools.cache
def _load_assets() -> Assets:
    """Load the embedded pair, once per worker: its cache key is computed from the whole corpus."""
    from topkd.compose.demo_assets.assets import build_assets, cache_root
    from topkd.compose.progress import Progress

    return build_assets(cache_root(), Progress())


async def _run_file(cell: Cell, _: Path, folder: Path) -> dict[str, Any]:
    from topkd.compose.train import train

    config = validate_config(RunConfig, cell.values, where=f"cell {cell.id}")
    result = await train(config, folder)
    return summarize_cell(config, result.steps, group_by_step(result.evals))


def group_by_step(evals: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group a run's evaluations into one record per step: fixed prefixes, and inside it the other kinds by name."""
    moments: dict[int, dict[str, Any]] = {}
    for record in evals:
        moment = moments.setdefault(record["step"], {})
        moment |= record if record["prefixes"] == "fixed" else {record["prefixes"]: dict(record)}
    return list(moments.values())


def summarize_cell(config: EngineConfig, steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize a cell: evaluations with the tokens trained on, means over steps, and the size of the scores."""
    trained = [0]
    for record in steps:
        trained.append(trained[-1] + record["tokens"])
    scored = sum(record["completion_tokens"] for record in steps)
    entries = scored * config.objective.count_entries(config.k)

    def mean(name: str) -> float | None:
        values = [record[name] for record in steps if isinstance(record.get(name), int | float)]
        return sum(values) / len(values) if values else None

    lengths = [record["completion_tokens"] / max(1, record["samples"]) for record in steps if record["samples"]]
    return {
        "evals": [{**record, "tokens": trained[record["step"]]} for record in evals],
        "steps": len(steps),
        "tokens": trained[-1],
        "tokens_per_step": sorted({record["tokens"] for record in steps}),
        "skipped": sum(bool(record["skipped"]) for record in steps),
        "lost": sum(sum(record["lost"].values()) for record in steps),
        "clipped": mean("clip_fraction"),
        "ess": mean("ess"),
        "grad_norm": mean("grad_norm"),
        "advantage_abs_mean": mean("advantage_abs_mean"),
        "effective_coefficient": mean("effective_coefficient"),
        "truncated": sum(record["truncated"] for record in steps) / max(1, sum(record["samples"] for record in steps)),
        "length_first": lengths[0] if lengths else None,
        "length_last": lengths[-1] if lengths else None,
        "teacher_calls": sum(record["samples"] for record in steps),
        "teacher_tokens": scored,
        "teacher_entries": entries,
        "teacher_bytes": 8 * entries,  # an int32 id and a float32 logprob each
    }
