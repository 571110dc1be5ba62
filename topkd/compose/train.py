"""``train``: a student, its prompts and its teachers, wired from one config."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topkd.compose.cache.live import LiveCache
from topkd.compose.config.run_config import RunConfig
from topkd.compose.preflight.preflight import TEACHERS, ready
from topkd.compose.progress import Progress
from topkd.compose.run.observers import open_observers
from topkd.compose.run.resume import enter_run
from topkd.compose.run.runner import RunResult, run
from topkd.compose.run.sampler import open_sampling
from topkd.compose.run.signals import StopSignals
from topkd.compose.run.student import load_student
from topkd.compose.teachers.feedback import build_feedback_context
from topkd.compose.teachers.local import LocalModel, open_local, publish_with_followers
from topkd.compose.teachers.served import open_teacher
from topkd.compose.teachers.usage import TeacherUsage
from topkd.topk.errors import ConfigError
from topkd.topk.protocols import TeacherScorer

if TYPE_CHECKING:
    from topkd.engine.learner.token_view import TokenLoss

__all__ = ["RunResult", "run", "train"]


async def train(
    config: RunConfig,
    out: Path,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    stops: StopSignals | None = None,
    loss: TokenLoss | None = None,
) -> RunResult:
    """Run one config to its end; checkpoint, metrics and provenance lie in ``out`` afterwards.

    With ``[cache]`` every score and rollout is kept there, nothing that is there is asked again, and ``replay`` can
    repeat the run without a server.

    Args:
        config: What shapes the run.
        out: Its folder.
        progress: Told what goes on.
        resume: Go on with the run that ``out`` holds.
        stops: Signals that end the run in order, to be resumed.
        loss: An objective of one's own, in place of the config's: the loss of each token, from a ``TokenView``.
    """
    progress = progress or Progress()
    async with contextlib.AsyncExitStack() as stack:
        former, ranks = stack.enter_context(enter_run(out, config, progress, command="train", resume=resume))
        if ranks is not None and not ranks.main:
            progress = Progress()
        if former.finished:
            return RunResult.of_finished(out, former)
        before = await ready(config, progress, kept=out / TEACHERS, resumed=former.resumed)
        pieces = load_student(config, progress, before.prompts)
        cache = stack.enter_context(LiveCache(config.cache)) if config.cache is not None else None
        teachers: dict[str, TeacherScorer] = {}
        scorers: dict[str, TeacherScorer] = {}
        fingerprints: dict[str, dict[str, Any]] = {}
        traffic = TeacherUsage()
        if ranks is not None and config.sampler.kind != "in_process":
            raise ConfigError(
                "several processes sample from the student in their own memory",
                got=f"sampler.kind {config.sampler.kind!r}", expected='sampler.kind = "in_process", or one process',
            )  # fmt: skip
        sampling = await stack.enter_async_context(open_sampling(config, pieces, out=out, progress=progress))
        local: dict[str, LocalModel] = {}
        for name, teacher in config.teacher_map().items():
            if teacher.kind != "server":
                local[name] = open_local(teacher, config, pieces.student, sampling.lock)
                fingerprints[name] = local[name].fingerprint()
                teachers[name] = local[name].scorer
                if cache is not None:
                    teachers[name] = cache.scorer(name, local[name].scorer, local[name].name, local[name].revision)
                continue
            met = await stack.enter_async_context(
                open_teacher(
                    teacher.urls,
                    dialect=teacher.dialect,
                    model=teacher.model,
                    api_key=teacher.api_key(),
                    config=config.client,
                    vocab_size=teacher.vocab_size,
                )
            )
            if met.fleet is not None:
                row = pieces.rows[0].teacher_prompt_ids
                await met.agree(row if row.size > 1 else np.repeat(row, 2), 0, 1)
            traffic.client(met.metrics)
            fingerprints[name] = met.fingerprint() | {"revision": teacher.revision}
            scorers[name] = teachers[name] = met.scorer
            if cache is not None:
                scorer = cache.scorer(name, met.scorer, met.name, teacher.revision)
                traffic.cache(scorer.metrics.as_dict)
                teachers[name] = scorer
        watch = await stack.enter_async_context(
            open_observers(
                config,
                student=pieces.student,
                prompts=before.prompts,
                models={name: model.model for name, model in local.items()},
                teachers=scorers,
                out=out,
                progress=progress,
                former=former,
            )
        )
        return await run(
            watch.config,
            student=pieces.student,
            tokenizer=pieces.tokenizer,
            rows=pieces.rows,
            teachers=teachers,
            out=out,
            progress=progress,
            evaluate=watch.evaluate,
            on_record=watch.heard,
            context=build_feedback_context(config, before.prompts),
            sampling=replace(sampling, publish=publish_with_followers(traffic.joining(sampling.publish, ranks), local)),
            wrap=None if cache is None else cache.recorder(config, pieces.student, pieces.rows, loss),
            account=None if cache is None else cache.account,
            notes={"teachers": fingerprints, **before.notes()},
            stateful={
                f"teacher-{name or 'self'}": model.state for name, model in local.items() if model.state is not None
            },
            former=former,
            stops=stops,
            ranks=ranks,
            loss=loss,
        )
