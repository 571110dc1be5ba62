"""The training loop: sample, score, learn; later batches are sampled and scored while the learner works.

The schedule is fixed, so a run is deterministic (``topkd.engine.loop.pipeline``); why: ``docs/design/002-loop.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.learner.distributed import Ranks
from topkd.engine.learner.learner import Learner
from topkd.engine.learner.objectives import describe_objective
from topkd.engine.loop.data_mixing import DATA, build_data_texts, check_mixture
from topkd.engine.loop.hooks import Hooks, Position, Record
from topkd.engine.loop.metrics import MetricsLog, find_alarms
from topkd.engine.loop.pipeline import BatchPipeline, Drawn, InFlight, Schedule
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.rollouts import draw_rollouts
from topkd.engine.loop.scoring import (
    ScoredBatch,
    check_support,
    compute_teacher_metrics,
    find_teacher,
    score_rollouts,
    summarize_scores,
)
from topkd.engine.loop.waiting import root_exception, to_thread_uncancelled, wait_unless_stopped
from topkd.topk.errors import CacheMissError, ConfigError, TrainingError
from topkd.topk.protocols import Sampler, TeacherScorer

Source: TypeAlias = Callable[[int], Awaitable[Drawn]]
STOP_GRACE_S = 10.0  # how long a stopped run waits for what only older weights can sample


@dataclass(frozen=True, slots=True)
class LoopParts:
    """Inputs of the loop.

    Attributes:
        config: Settings of the loop.
        rows: Prompts.
        sampler: Samples from the student.
        teachers: teacher_id -> scorer; ids are checked before the first request.
        source: Returns a step's rollouts, each with its row, and replaces the sampler.
        earlier: The step records before ``start``, for alarms that compare a step with earlier ones.
        stop: Once set, the run ends cleanly before its next step: nothing is lost, requests are cancelled.
        ranks: The processes that share each step, all with the same config; only the first writes and evaluates.
    """

    config: EngineConfig
    rows: Sequence[PromptRow]
    sampler: Sampler
    teachers: Mapping[str, TeacherScorer]
    source: Source | None = None
    earlier: Sequence[Record] = ()
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ranks: Ranks = field(default_factory=Ranks)


async def distil(
    parts: LoopParts, learner: Learner, log: MetricsLog, hooks: Hooks | None = None, start: Position | None = None
) -> list[Record]:
    """Run on-policy distillation from ``start`` to ``config.steps`` and return the step records.

    Args:
        parts: Prompts, sampler, teachers, and the config.
        learner: Trains the student.
        log: The run log.
        hooks: Evaluation, display, weight sync, checkpoints.
        start: The position in a checkpoint; None starts at the beginning.
    """
    check_run(parts.config, parts.rows, parts.teachers)
    run = _Run(parts, learner, log, hooks or Hooks(), start or Position())
    try:
        async with asyncio.TaskGroup() as group:
            await run.run_steps(group)
    except BaseException as error:
        run.save_after_failure()
        if isinstance(error, BaseExceptionGroup):
            raise root_exception(error) from error
        raise
    return run.records[len(parts.earlier) :]


class _Run:
    def __init__(self, parts: LoopParts, learner: Learner, log: MetricsLog, hooks: Hooks, start: Position) -> None:
        config, self.rows, self.ranks, self.source = parts.config, parts.rows, parts.ranks, parts.source
        self.config, self.learner, self.log, self.hooks = config, learner, log, hooks
        self.first, self.evaluated, self.kept = start.step, start.evaluated, start.step
        self.stop = parts.stop
        self.began = time.perf_counter() - start.elapsed_s
        self.records: list[Record] = [*parts.earlier]
        self.done = start.step
        self.unwritten: deque[Record] = deque()  # records of steps whose weights are not yet published
        self.torn = False  # the run log could not be written

        async def draw(step: int) -> Drawn:
            if parts.source is None:
                return await draw_rollouts(config, parts.rows, parts.sampler, step, parts.ranks)
            asked, rollouts = await parts.source(step)
            return list(parts.ranks.slice(asked)), list(parts.ranks.slice(rollouts))

        self.pipeline = BatchPipeline(
            parts.rows,
            Schedule(config.steps, config.max_staleness, hooks.publish_while_sampling and hooks.capture is not None),
            draw=draw,
            score=lambda asked, rollouts: score_rollouts(
                asked,
                rollouts,
                parts.teachers,
                config.k,
                truncated=config.rollout.truncated,
                context=hooks.context,
                support=config.objective.list_support,
            ),
            publish=self.publish,
            on_event=lambda event: self.write("event", event),
            start=start,
        )

    async def run_steps(self, group: asyncio.TaskGroup) -> None:
        pipeline, alone = self.pipeline, self.hooks.capture is None
        if self.hooks.capture is not None:
            await asyncio.to_thread(self.hooks.capture, self.first)
        pipeline.start(group)
        await pipeline.published.wait_for(self.first)
        await self.evaluate(self.first)
        pipeline.released.advance_to(self.first)
        for step in range(self.first, self.config.steps):
            if self.ranks.size > 1 and await self.should_stop():
                break
            sampled = pipeline.schedule.batches_due(step) if alone else step + 1
            if not await self.wait_unless_stopped(pipeline.sampled.wait_for(sampled)):
                break
            began, drawn = time.perf_counter(), pipeline.batch(step)
            if not await self.wait_unless_stopped(asyncio.wait({drawn.scored})):
                break
            batch = drawn.scored.result()
            await self.learn(step, drawn, batch, time.perf_counter() - began)
            pipeline.release(step)
            version = step + 1
            is_due = self.is_checkpoint_due(version)
            pipeline.weights.advance_to(version)
            if alone or is_due or self.is_evaluation_due(version):
                await pipeline.published.wait_for(version)
                await self.evaluate(version)
                if is_due:
                    await asyncio.to_thread(self.checkpoint)
            pipeline.released.advance_to(version)
        await self.finish()

    def learn_batch(self, step: int, batch: ScoredBatch) -> Record:
        """Take the learner's step and summarise the scores of all ranks; runs in a thread."""
        texts = self.ranks.slice(build_data_texts(self.config, self.rows, step))
        learnt = self.learner.step(batch.samples, texts)
        return learnt | compute_teacher_metrics(self.ranks.gather(summarize_scores(batch)))

    async def learn(self, step: int, drawn: InFlight, batch: ScoredBatch, waited_s: float) -> None:
        refuse_losses(self.config, batch, step)
        if self.hooks.on_batch is not None and self.ranks.main:
            await asyncio.to_thread(self.hooks.on_batch, step + 1, batch)
        began = time.perf_counter()
        learnt, cancelled = await to_thread_uncancelled(self.learn_batch, step, batch)
        # How far another run's policy is from this learner's is not known, whatever its versions are called.
        ours = self.source is None and not self.hooks.foreign
        fresh = ours and drawn.versions == (str(step),)
        record: Record = {
            "step": step + 1,
            **describe_objective(self.learner.objective),
            "version": step + 1,
            "staleness": _compute_staleness(step, drawn) if ours else None,
            "rollout_versions": [*drawn.versions],
            **learnt,
            # Sampled from exactly the weights that this step changes: the difference is the sampler's arithmetic.
            "mismatch_kl": learnt.get("mismatch_kl") if fresh else None,
            "sample_s": drawn.sample_s,
            "score_wait_s": waited_s,
            "learn_s": time.perf_counter() - began,
            "elapsed_s": time.perf_counter() - self.began,
        }
        self.records.append(record)
        self.done = step + 1
        record["alarms"] = find_alarms(self.records)
        self.unwritten.append(record)
        if cancelled is not None:
            raise cancelled
        if self.hooks.capture is not None:
            await asyncio.to_thread(self.hooks.capture, step + 1)

    async def publish(self, version: int) -> None:
        began = time.perf_counter()
        sync_record = await self.hooks.publish(version) if self.hooks.publish is not None else None
        if version > self.first:
            record = self.unwritten.popleft()
            sounding = [*record["alarms"], *(sync_record or {}).get("alarms", [])]
            record |= {"publish_s": time.perf_counter() - began, **(sync_record or {}), "alarms": sounding}
            self.write_record(record)
        elif (
            sync_record and "sampler_version" in sync_record
        ):  # the sampler has its own weights, sent before the first step
            self.write_record({"step": version, "event": "published", **sync_record}, "event")

    def write_record(self, record: Record, kind: str = "step") -> None:
        """Write a record to the run log, and an event for each of its alarms."""
        sounding = record.pop("alarms", [])
        self.write(kind, record)
        for alarm in sounding:
            self.write("event", {"event": "alarm", "step": record["step"], **alarm})

    def is_evaluation_due(self, step: int) -> bool:
        """Tell whether an evaluation is due after ``step`` steps."""
        every = self.config.eval_every
        return self.evaluated < step and (step in (0, self.config.steps) or bool(every and step % every == 0))

    async def evaluate(self, step: int) -> None:
        if self.hooks.evaluate is None or not self.is_evaluation_due(step):
            return
        found = await asyncio.to_thread(self.hooks.evaluate) if self.ranks.main else []
        for record in found if isinstance(found, list) else [found]:
            self.write("eval", {"step": step, **record})
        self.evaluated = step

    def is_checkpoint_due(self, step: int) -> bool:
        """Tell whether a checkpoint is due after ``step`` steps."""
        every = self.config.checkpoint.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def checkpoint(self) -> None:
        """Write a checkpoint, if the position can be resumed and has none yet."""
        step = self.done
        if self.hooks.checkpoint is None or not self.config.checkpoint.every or step == self.kept:
            return
        if self.learner.version != step:  # a failed step has raised the version: keep the last checkpoint
            return
        elapsed_s = time.perf_counter() - self.began
        self.hooks.checkpoint(Position(step, self.evaluated, elapsed_s, self.pipeline.queue(step)))
        self.kept = step

    async def finish(self) -> None:
        step = self.done
        if step == self.config.steps:
            await self.pipeline.published.wait_for(step)
            return
        with contextlib.suppress(TimeoutError):  # stopped: wait briefly for what only older weights can sample
            async with asyncio.timeout(STOP_GRACE_S):
                await self.pipeline.published.wait_for(step)
        self.pipeline.stop()
        self.flush()
        await asyncio.to_thread(self.checkpoint)

    def save_after_failure(self) -> None:
        """Write the run log's last records and a checkpoint, unless the run log cannot be written."""
        if self.torn:  # the log lacks records of steps that a new checkpoint would include: keep the last one
            return
        self.flush()
        if self.ranks.size == 1:  # several processes can only save together, and one of them has failed
            self.checkpoint()

    def flush(self) -> None:
        while self.unwritten:
            self.write_record(self.unwritten.popleft())

    def write(self, kind: str, record: Record) -> None:
        if not self.ranks.main:
            return
        try:
            self.log.write(kind, record)
        except OSError:
            self.torn = True
            raise
        if self.hooks.on_record is not None:
            self.hooks.on_record(kind, record)

    async def wait_unless_stopped(self, work: Awaitable[object]) -> bool:
        """Wait for the work; False when the run is to stop (several processes use ``should_stop`` instead)."""
        if self.ranks.size == 1:
            return await wait_unless_stopped(self.stop, work)
        await work
        return True

    async def should_stop(self) -> bool:
        """Return whether any of the processes is to stop."""
        return bool(await asyncio.to_thread(self.ranks.most, int(self.stop.is_set())))


def _compute_staleness(step: int, drawn: InFlight) -> int | None:
    """Count how many versions older the sampling weights are than the learning ones; None if nothing was sampled."""
    if not set(drawn.versions) - {DATA}:
        return None
    numbered = [int(version) for version in drawn.versions if version.isdecimal()]
    return step - min([drawn.version, *numbered])


def check_run(config: EngineConfig, rows: Sequence[PromptRow], teachers: Mapping[str, TeacherScorer]) -> None:
    """Check that prompts fit, and that the teachers can do what the objective needs."""
    if not rows:
        raise ConfigError("no prompts to train on", hint="check the data file and the length limits")
    check_mixture(config, rows)
    if not config.objective.is_data_only:
        for teacher_id in {row.teacher_id for row in rows}:
            find_teacher(teachers, teacher_id)
    check_support(config.objective.list_support, teachers)
    longest = max(rows, key=lambda row: row.prompt_ids.size)
    if longest.prompt_ids.size > config.rollout.max_prompt_tokens:
        raise ConfigError(
            "a prompt is longer than rollout.max_prompt_tokens",
            where=f"row {longest.sample_id or '?'}",
            got=longest.prompt_ids.size,
            expected=f"at most {config.rollout.max_prompt_tokens}",
            hint='raise the limit or set overlong = "drop"; prompts are never cut silently',
        )


def refuse_losses(config: EngineConfig, batch: ScoredBatch, step: int) -> None:
    """Raise an error if more than ``max_lost_fraction`` of a step's samples were lost."""
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
