"""The run: sample, score, learn, with scoring in flight while the next batch is sampled and the last one learnt.

The schedule is fixed, so a run is deterministic: the batch of step t is sampled from the weights after step
``max(0, t - max_staleness)``, whatever the servers' speed. Scores of up to ``max_staleness`` batches are in
flight while the learner works; nothing more is ever queued.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from topkd.engine.config import EngineConfig
from topkd.engine.data import PromptRow, step_indices
from topkd.engine.learner import Learner
from topkd.engine.metrics import MetricsLog
from topkd.engine.scoring import ScoredBatch, score_rollouts, teacher_for, teacher_metrics
from topkd.topk.errors import CacheMissError, ConfigError, TrainingError
from topkd.topk.protocols import Ids, Sampler, TeacherScorer
from topkd.topk.samples import Rollout, SamplingParams

Record = dict[str, Any]
Source: TypeAlias = Callable[[int], Awaitable[tuple[list[PromptRow], list[Rollout]]]]


@runtime_checkable
class BatchSampler(Protocol):
    """A sampler that decodes many prompts together."""

    async def sample_batch(
        self, prompts: Sequence[Ids], n: int, params: SamplingParams, *, k: int = 0
    ) -> list[list[Rollout]]:
        """N rollouts for each prompt."""
        ...


async def distil(
    config: EngineConfig,
    *,
    rows: Sequence[PromptRow],
    sampler: Sampler,
    teachers: Mapping[str, TeacherScorer],
    learner: Learner,
    log: MetricsLog,
    evaluate: Callable[[], Record] | None = None,
    on_record: Callable[[str, Record], None] | None = None,
    set_version: Callable[[str], None] | None = None,
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
        evaluate: Called (in a thread) before the first step, every ``eval_every`` steps and after the last.
        on_record: Told every record, for a display.
        set_version: Told the weight version at the start and after each step, before anything is sampled from it.
        source: Gives a step's rollouts, each with its row, in place of drawing them with the sampler.
    """
    _check(config, rows, teachers)

    def write(kind: str, record: Record) -> None:
        log.write(kind, record)
        if on_record is not None:
            on_record(kind, record)

    async def evaluation(step: int) -> None:
        if evaluate is not None:
            write("eval", {"step": step, **await asyncio.to_thread(evaluate)})

    if set_version is not None:
        set_version(str(learner.version))
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
                        source(sampled) if source is not None else _sample(config, rows, sampler, sampled)
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
                if set_version is not None:
                    set_version(str(learner.version))
                write("step", record)
                records.append(record)
                if (config.eval_every and (step + 1) % config.eval_every == 0) or step + 1 == config.steps:
                    await evaluation(step + 1)
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    return records


async def _sample(
    config: EngineConfig, rows: Sequence[PromptRow], sampler: Sampler, step: int
) -> tuple[list[PromptRow], list[Rollout]]:
    chosen = [rows[i] for i in step_indices(len(rows), config.rollout.prompts_per_step, step, config.seed)]
    params = SamplingParams(
        max_tokens=config.rollout.max_completion_tokens, seed=derived_seed(config.seed, "rollout", step)
    )
    n, prompts = config.rollout.samples_per_prompt, [row.prompt_ids for row in chosen]
    if isinstance(sampler, BatchSampler):
        drawn = await sampler.sample_batch(prompts, n, params)
    else:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sampler.sample(prompt, n, params)) for prompt in prompts]
        drawn = [task.result() for task in tasks]
    return [row for row in chosen for _ in range(n)], [rollout for group_ in drawn for rollout in group_]


def derived_seed(seed: int, *path: object) -> int:
    """A 31-bit seed for one purpose of a run, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *path)).encode(), digest_size=4).digest(), "big") >> 1


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
