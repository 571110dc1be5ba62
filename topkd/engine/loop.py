"""The run: sample, score, learn, with scoring in flight while the next batch is sampled and the last one learnt.

The schedule is fixed, so a run is deterministic: the batch of step t is sampled from the weights after step
``max(0, t - max_staleness)``, whatever the servers' speed. Scores of up to ``max_staleness`` batches are in
flight while the learner works; nothing more is ever queued.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from topkd.engine.config import EngineConfig
from topkd.engine.data import PromptRow
from topkd.engine.hooks import Hooks, Record
from topkd.engine.learner import Learner
from topkd.engine.metrics import MetricsLog
from topkd.engine.rollouts import draw
from topkd.engine.scoring import ScoredBatch, score_rollouts, teacher_for, teacher_metrics
from topkd.topk.errors import CacheMissError, ConfigError, TrainingError
from topkd.topk.protocols import Sampler, TeacherScorer
from topkd.topk.samples import Rollout

Source: TypeAlias = Callable[[int], Awaitable[tuple[list[PromptRow], list[Rollout]]]]


async def distil(
    config: EngineConfig,
    *,
    rows: Sequence[PromptRow],
    sampler: Sampler,
    teachers: Mapping[str, TeacherScorer],
    learner: Learner,
    log: MetricsLog,
    hooks: Hooks | None = None,
    source: Source | None = None,
) -> list[Record]:
    """Run ``config.steps`` steps of on-policy distillation and return the step records.

    Args:
        config: Everything that shapes the run.
        rows: Prompts.
        sampler: The student, as something that samples.
        teachers: teacher_id -> scorer; ids are checked before the first request.
        learner: The student, as something that learns.
        log: Where the records go.
        hooks: Evaluation, display, weight sync.
        source: Gives a step's rollouts, each with its row, in place of drawing them with the sampler.
    """
    _check(config, rows, teachers)
    hooks = hooks or Hooks()

    def write(kind: str, record: Record) -> None:
        log.write(kind, record)
        if hooks.on_record is not None:
            hooks.on_record(kind, record)

    async def evaluation(step: int) -> None:
        if hooks.evaluate is not None:
            write("eval", {"step": step, **await asyncio.to_thread(hooks.evaluate)})

    if hooks.publish is not None:
        await hooks.publish(learner.version)
    records: list[Record] = []
    in_flight: list[tuple[int, list[str], float, asyncio.Task[ScoredBatch]]] = []
    sampled = 0
    try:
        async with asyncio.TaskGroup() as group:
            await evaluation(0)
            for step in range(config.steps):
                while sampled < min(step + config.max_staleness + 1, config.steps):
                    began = time.perf_counter()
                    asked, rollouts = await (
                        source(sampled) if source is not None else draw(config, rows, sampler, sampled)
                    )
                    task = group.create_task(score_rollouts(asked, rollouts, teachers, config.k))
                    versions = sorted({rollout.version for rollout in rollouts}, key=lambda v: (len(v), v))
                    in_flight.append((learner.version, versions, time.perf_counter() - began, task))
                    sampled += 1
                began = time.perf_counter()
                version, versions, sample_s, task = in_flight.pop(0)
                batch = await task
                waited_s = time.perf_counter() - began
                _refuse_losses(config, batch, step)
                if hooks.on_batch is not None:
                    await asyncio.to_thread(hooks.on_batch, step + 1, batch)
                began = time.perf_counter()
                # Rollouts that a source gives are of another run's policy: no distance to this learner's is known.
                staleness = learner.version - version if source is None else None
                learnt = await asyncio.to_thread(learner.step, batch.samples)
                record: Record = {
                    "step": step + 1,
                    "divergence_mode": config.objective.kind,
                    "objective": config.objective.model_dump(),
                    "version": learner.version,
                    "staleness": staleness,
                    "rollout_versions": versions,
                    **learnt,
                    **teacher_metrics(batch),
                    "sample_s": sample_s,
                    "score_wait_s": waited_s,
                    "learn_s": time.perf_counter() - began,
                }
                if hooks.publish is not None:
                    record |= await hooks.publish(learner.version) or {}
                write("step", record)
                records.append(record)
                if (config.eval_every and (step + 1) % config.eval_every == 0) or step + 1 == config.steps:
                    await evaluation(step + 1)
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    return records


def _check(config: EngineConfig, rows: Sequence[PromptRow], teachers: Mapping[str, TeacherScorer]) -> None:
    if not rows:
        raise ConfigError("no prompts to train on", hint="check the data file and the length limits")
    for teacher_id in {row.teacher_id for row in rows}:
        teacher_for(teachers, teacher_id)
    longest = max(rows, key=lambda row: row.prompt_ids.size)
    if longest.prompt_ids.size > config.rollout.max_prompt_tokens:
        raise ConfigError(
            "a prompt is longer than rollout.max_prompt_tokens",
            where=f"row {longest.sample_id or '?'}",
            got=longest.prompt_ids.size,
            expected=f"at most {config.rollout.max_prompt_tokens}",
            hint='raise the limit or set overlong = "drop"; prompts are never cut silently',
        )


def _refuse_losses(config: EngineConfig, batch: ScoredBatch, step: int) -> None:
    lost = batch.lost.total()
    if lost <= config.max_lost_fraction * batch.total:
        return
    if batch.first_error is not None and (lost == batch.total or isinstance(batch.first_error, CacheMissError)):
        raise batch.first_error
    raise TrainingError(
        f"step {step + 1} lost {lost} of {batch.total} samples",
        got=f"{dict(batch.lost)}; first: {batch.first_error}",
        expected=f"at most the fraction max_lost_fraction = {config.max_lost_fraction}",
    ) from batch.first_error


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
