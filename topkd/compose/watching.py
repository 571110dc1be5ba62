"""What watches a run: its evaluation and its trackers, opened together and told the same records."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkd.compose.config import RunConfig
from topkd.compose.pieces import Prompts
from topkd.compose.progress import Progress
from topkd.compose.resume import Former
from topkd.compose.tracking import Tracking


@dataclass(frozen=True, slots=True)
class Watch:
    """Hooks of a run, as ``run`` takes them.

    Attributes:
        config: The run's, evaluated as its ``[eval]`` says.
        evaluate: None without ``[eval]``.
        heard: Told every diary record.
    """

    config: RunConfig
    evaluate: Callable[[], list[dict[str, Any]]] | None
    heard: Callable[[str, dict[str, Any]], None]


@contextlib.asynccontextmanager
async def watching(
    config: RunConfig,
    *,
    student: Any,
    prompts: Prompts,
    models: Mapping[str, Any],
    teachers: Mapping[str, object],
    out: Path,
    progress: Progress,
    former: Former,
) -> AsyncIterator[Watch]:
    """Open what the config asks for; the teacher's ceiling is measured here, before the first step.

    Args:
        config: Of the run.
        student: The loaded student.
        prompts: The run's.
        models: teacher_id -> the teacher's weights, for teachers in this process.
        teachers: teacher_id -> what scores, asked to answer for the ceiling.
        out: The run's folder.
        progress: Told what goes on.
        former: What a resumed run goes on from.
    """
    step = 0 if former.checkpoint is None else former.checkpoint.position.step
    evaluation = None
    if config.eval is not None:
        from topkd.compose.evaluating import Evaluation

        evaluation = Evaluation(config, config.eval, student=student, prompts=prompts, models=models, out=out)
        evaluation.heard("step", {"step": step})
        await evaluation.measure_ceiling(teachers, progress)
        config = config.model_copy(update={"eval_every": config.eval.every or config.eval_every})
    resumed = step if former.resumed else None
    with Tracking(config.track, out, config.model_dump(mode="json"), resume_step=resumed) as tracking:

        def heard(kind: str, record: dict[str, Any]) -> None:
            if evaluation is not None:
                evaluation.heard(kind, record)
            tracking.heard(kind, record)

        yield Watch(config, evaluation, heard)
