"""``train``: a student, its prompts and its teachers, wired from one config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topkd.compose.config import RunConfig, saved
from topkd.compose.folders import fresh_folder, provenance
from topkd.compose.live_cache import LiveCache
from topkd.compose.pieces import load_pieces
from topkd.compose.progress import Progress
from topkd.compose.samplers import Sampling, in_process
from topkd.compose.teachers import open_teacher
from topkd.compose.traffic import Traffic
from topkd.engine import EngineConfig
from topkd.engine.data import PromptRow
from topkd.engine.hooks import Hooks
from topkd.engine.loop import Source
from topkd.engine.metrics import MetricsLog
from topkd.engine.scoring import ScoredBatch
from topkd.topk.protocols import Sampler, TeacherScorer


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a finished run lies, and its records."""

    out: Path
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]


async def train(config: RunConfig, out: Path, progress: Progress | None = None) -> RunResult:
    """Run one config to its end; checkpoint, metrics and provenance lie in ``out`` afterwards.

    With ``[cache]`` every score and rollout is kept there, nothing that is there is asked again, and ``replay`` can
    repeat the run without a server.
    """
    progress = progress or Progress()
    fresh_folder(out)
    saved(config, out / "config.json")
    pieces = load_pieces(config, progress)
    async with contextlib.AsyncExitStack() as stack:
        cache = stack.enter_context(LiveCache(config.cache)) if config.cache is not None else None
        teachers: dict[str, TeacherScorer] = {}
        traffic = Traffic()
        for name, teacher in config.teacher_map().items():
            progress.note(f"asking the teacher at {', '.join(teacher.urls)}")
            opened = await stack.enter_async_context(
                open_teacher(
                    teacher.urls,
                    dialect=teacher.dialect,
                    model=teacher.model,
                    api_key=teacher.api_key(),
                    config=config.client,
                )
            )
            if opened.fleet is not None:
                row = pieces.rows[0].teacher_prompt_ids
                await opened.agree(row if row.size > 1 else np.repeat(row, 2), 0, 1)
            traffic.client(opened.metrics)
            teachers[name] = opened.scorer
            if cache is not None:
                scorer = cache.scorer(name, opened.scorer, opened.name, teacher.revision)
                traffic.cache(scorer.metrics.as_dict)
                teachers[name] = scorer
        sampling = in_process(config, pieces.student, pieces.tokenizer)
        return await run(
            config,
            student=pieces.student,
            tokenizer=pieces.tokenizer,
            rows=pieces.rows,
            teachers=teachers,
            out=out,
            progress=progress,
            sampling=replace(sampling, publish=traffic.joining(sampling.publish)),
            wrap=None if cache is None else cache.recorder(config, pieces.student, pieces.rows),
            account=None if cache is None else cache.account,
        )


async def run(
    config: EngineConfig,
    *,
    student: Any,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    teachers: Mapping[str, TeacherScorer],
    out: Path,
    progress: Progress,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    sampling: Sampling | None = None,
    wrap: Callable[[Sampler], Sampler] | None = None,
    on_batch: Callable[[int, ScoredBatch], None] | None = None,
    source: Source | None = None,
    account: Callable[[], dict[str, Any]] | None = None,
) -> RunResult:
    """The engine's loop over ready pieces, with its diary, provenance and final checkpoint in ``out``.

    ``sampling`` is where rollouts come from (None: the student in this process), ``wrap`` puts something around (or in
    place of) that sampler, ``on_batch`` sees each batch before it is learnt from, ``source`` gives the rollouts instead
    of any sampler, and ``account`` tells what the diary should end with.
    """
    from topkd.engine.checkpoint import save_student
    from topkd.engine.learner import Learner
    from topkd.engine.loop import distil

    sampling = sampling or in_process(config, student, tokenizer)
    learner = Learner(student, config.learner, config.objective, lock=sampling.lock, steps=config.steps)
    evals: list[dict[str, Any]] = []

    def on_record(kind: str, record: dict[str, Any]) -> None:
        if kind == "eval":
            evals.append(record)
        progress.record(kind, record)

    def checkpoint(*, stopped: bool) -> dict[str, Any]:
        return {"version": learner.version, "objective": config.objective.model_dump(), "stopped": stopped}

    progress.stage("distil", config.steps)
    with MetricsLog(out / "metrics.jsonl") as log:
        log.write("event", {"event": "start", **provenance(student)})
        try:
            steps = await distil(
                config,
                rows=rows,
                sampler=sampling.sampler if wrap is None else wrap(sampling.sampler),
                teachers=teachers,
                learner=learner,
                log=log,
                hooks=Hooks(evaluate, on_record, sampling.publish, on_batch),
                source=source,
            )
        except BaseException as error:  # an interrupt, a dead teacher: what was learnt is kept, and the diary says why
            log.write("event", {"event": "stopped", "version": learner.version, "reason": type(error).__name__})
            if learner.version:
                with learner.lock:
                    save_student(student, tokenizer, out / "student", checkpoint(stopped=True))
                progress.note(
                    f"stopped after step {learner.version} of {config.steps}; the student so far: {out / 'student'}"
                )
            raise
        if account is not None:
            log.write("event", account())
    save_student(student, tokenizer, out / "student", checkpoint(stopped=False))
    return RunResult(out, steps, evals)
