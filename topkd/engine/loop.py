"""The run: sample, score, learn, with batches ahead of the learner being sampled and scored while it works.

The schedule is fixed, so a run is deterministic (``topkd.engine.supply``). What happens when: ``docs/loop.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from topkd.engine.alarms import alarms
from topkd.engine.candidates import check_support, support_of
from topkd.engine.config import EngineConfig
from topkd.engine.data import PromptRow
from topkd.engine.hooks import Hooks, Record
from topkd.engine.learner import Learner
from topkd.engine.metrics import MetricsLog
from topkd.engine.mixing import check_mixture, data_texts
from topkd.engine.objective_config import SFT
from topkd.engine.objectives import described
from topkd.engine.position import Position
from topkd.engine.rollouts import draw
from topkd.engine.scoring import ScoredBatch, score_rollouts, teacher_for, teacher_metrics
from topkd.engine.supply import Drawn, InFlight, Supply
from topkd.topk.errors import CacheMissError, ConfigError, TrainingError
from topkd.topk.protocols import Sampler, TeacherScorer

T = TypeVar("T")
Source: TypeAlias = Callable[[int], Awaitable[Drawn]]
MISMATCH_ALARM_NATS = 0.02  # bfloat16 against float32 stays below a hundredth
STOP_GRACE_S = 10.0  # what a stopped run waits for a batch from weights that are gone, so that it need not be redrawn


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
    start: Position | None = None,
    earlier: Sequence[Record] = (),
    stop: asyncio.Event | None = None,
) -> list[Record]:
    """Run on-policy distillation from ``start`` to ``config.steps`` and return the step records.

    Args:
        config: Everything that shapes the run.
        rows: Prompts.
        sampler: The student, as something that samples.
        teachers: teacher_id -> scorer; ids are checked before the first request.
        learner: The student, as something that learns.
        log: Where the records go.
        hooks: Evaluation, display, weight sync, checkpoints.
        source: Gives a step's rollouts, each with its row, in place of drawing them with the sampler.
        start: Where a checkpoint left the run; its beginning when left out.
        earlier: The step records before it, for what compares a step with those before.
        stop: Once set, the run ends before its next step, in order: nothing is lost, requests are cancelled.
    """
    _check(config, rows, teachers)
    run = _Run(
        config,
        rows=rows,
        sampler=sampler,
        teachers=teachers,
        learner=learner,
        log=log,
        hooks=hooks or Hooks(),
        source=source,
        start=start or Position(),
        earlier=earlier,
        stop=stop,
    )
    try:
        async with asyncio.TaskGroup() as group:
            await run.steps(group)
    except BaseException as error:
        run.failed()
        if isinstance(error, BaseExceptionGroup):
            raise _first(error) from error
        raise
    return run.records[len(earlier) :]


class _Run:
    def __init__(
        self,
        config: EngineConfig,
        *,
        rows: Sequence[PromptRow],
        sampler: Sampler,
        teachers: Mapping[str, TeacherScorer],
        learner: Learner,
        log: MetricsLog,
        hooks: Hooks,
        source: Source | None,
        start: Position,
        earlier: Sequence[Record],
        stop: asyncio.Event | None,
    ) -> None:
        self.config, self.learner, self.log, self.hooks, self.source = config, learner, log, hooks, source
        self.rows = rows
        self.first, self.evaluated, self.kept = start.step, start.evaluated, start.step
        self.stop = stop or asyncio.Event()
        self.began = time.perf_counter() - start.elapsed_s
        self.records: list[Record] = [*earlier]
        self.done = start.step
        self.unwritten: deque[Record] = deque()  # steps whose weights are still on their way to the sampler

        async def drawn(step: int) -> Drawn:
            return await (source(step) if source is not None else draw(config, rows, sampler, step))

        self.supply = Supply(
            rows=rows,
            steps=config.steps,
            max_staleness=config.max_staleness,
            draw=drawn,
            score=lambda asked, rollouts: score_rollouts(
                asked,
                rollouts,
                teachers,
                config.k,
                truncated=config.rollout.truncated,
                context=hooks.context,
                support=support_of(config.objective),
            ),
            publish=self.publish,
            told=lambda event: self.write("event", event),
            start=start,
            beside=hooks.beside and hooks.capture is not None,
        )

    async def steps(self, group: asyncio.TaskGroup) -> None:
        supply, alone = self.supply, self.hooks.capture is None
        if self.hooks.capture is not None:
            await asyncio.to_thread(self.hooks.capture, self.first)
        supply.start(group)
        await supply.published.reached(self.first)
        await self.evaluate(self.first)
        supply.released.to(self.first)
        for step in range(self.first, self.config.steps):
            sampled = supply.due(step) if alone else step + 1
            if not await self.before_stop(supply.sampled.reached(sampled)):
                break
            began, taken = time.perf_counter(), supply.batch(step)
            if not await self.before_stop(asyncio.wait({taken.scored})):
                break
            batch = taken.scored.result()
            await self.learn(step, taken, batch, time.perf_counter() - began)
            supply.learnt(step)
            version = step + 1
            keeping = self.keeps(version)
            if alone or keeping or self.evaluates(version):
                supply.weights.to(version)
                await supply.published.reached(version)
                await self.evaluate(version)
                if keeping:
                    await asyncio.to_thread(self.checkpoint)
            else:
                supply.weights.to(version)
            supply.released.to(version)
        await self.end()

    async def learn(self, step: int, taken: InFlight, batch: ScoredBatch, waited_s: float) -> None:
        _refuse_losses(self.config, batch, step)
        if self.hooks.on_batch is not None:
            await asyncio.to_thread(self.hooks.on_batch, step + 1, batch)
        began = time.perf_counter()
        learnt, cancelled = await _whole(self.learner.step, batch.samples, data_texts(self.config, self.rows, step))
        record: Record = {
            "step": step + 1,
            **described(self.learner.objective),
            "version": step + 1,
            # Rollouts that a source gives are of another run's policy: no distance to this learner's is known.
            "staleness": _staleness(step, taken) if self.source is None else None,
            "rollout_versions": [*taken.versions],
            **learnt,
            # Of the very weights that step, before they change: what is left is the sampler's own arithmetic.
            "mismatch_kl": learnt.get("behavior_kl_k3") if taken.versions == (str(step),) else None,
            **teacher_metrics(batch),
            "sample_s": taken.sample_s,
            "score_wait_s": waited_s,
            "learn_s": time.perf_counter() - began,
            "elapsed_s": time.perf_counter() - self.began,
        }
        if batch.total:
            record["truncation_rate"] = batch.truncated / batch.total
        self.records.append(record)
        self.done = step + 1
        record["alarms"] = alarms(self.records)
        self.unwritten.append(record)
        if cancelled is not None:
            raise cancelled
        if self.hooks.capture is not None:
            await asyncio.to_thread(self.hooks.capture, step + 1)

    async def publish(self, version: int) -> None:
        began = time.perf_counter()
        told = await self.hooks.publish(version) if self.hooks.publish is not None else None
        if version > self.first:
            record = self.unwritten.popleft()
            sounding = [*record["alarms"], *(told or {}).get("alarms", [])]
            record |= {"publish_s": time.perf_counter() - began, **(told or {}), "alarms": sounding}
            self.written(record)
        elif told and "sampler_version" in told:  # weights of its own, brought there before the first step
            self.written({"step": version, "event": "published", **told}, "event")

    def written(self, record: Record, kind: str = "step") -> None:
        """Into the diary, and an event of its own for each alarm in it."""
        sounding = record.pop("alarms", [])
        mismatch = record.get("mismatch_kl")
        if mismatch is not None and mismatch > MISMATCH_ALARM_NATS:
            sounding = [*sounding, {"alarm": "mismatch_kl", "value": mismatch, "limit": MISMATCH_ALARM_NATS}]
        self.write(kind, record)
        for alarm in sounding:
            self.write("event", {"event": "alarm", "step": record["step"], **alarm})

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after this many steps."""
        every = self.config.eval_every
        return self.evaluated < step and (step in (0, self.config.steps) or bool(every and step % every == 0))

    async def evaluate(self, step: int) -> None:
        if self.hooks.evaluate is None or not self.evaluates(step):
            return
        found = await asyncio.to_thread(self.hooks.evaluate)
        for record in found if isinstance(found, list) else [found]:
            self.write("eval", {"step": step, **record})
        self.evaluated = step

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        every = self.config.checkpoint.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def checkpoint(self) -> None:
        """Hand over the position, when it is one a run can go on from and has not been kept yet."""
        step = self.done
        if self.hooks.checkpoint is None or not self.config.checkpoint.every or step == self.kept:
            return
        if self.learner.version != step:  # the step that failed has counted itself: the former checkpoint stands
            return
        elapsed_s = time.perf_counter() - self.began
        self.hooks.checkpoint(Position(step, self.evaluated, elapsed_s, self.supply.queue(step)))
        self.kept = step

    async def end(self) -> None:
        step = self.done
        if step == self.config.steps:
            await self.supply.published.reached(step)
            return
        with contextlib.suppress(TimeoutError):  # stopped: what only the former weights could give is worth a moment
            async with asyncio.timeout(STOP_GRACE_S):
                await self.supply.published.reached(step)
        self.supply.stop()
        self.flush()
        await asyncio.to_thread(self.checkpoint)

    def failed(self) -> None:
        """What was learnt is in the diary and in a checkpoint, whatever happened."""
        self.flush()
        self.checkpoint()

    def flush(self) -> None:
        while self.unwritten:
            self.written(self.unwritten.popleft())

    def write(self, kind: str, record: Record) -> None:
        self.log.write(kind, record)
        if self.hooks.on_record is not None:
            self.hooks.on_record(kind, record)

    async def before_stop(self, work: Awaitable[object]) -> bool:
        """Wait for the work; False when the run is stopped first, and the waiting is given up."""
        waiting, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            stopped.cancel()
        return not self.stop.is_set()


async def _whole(function: Callable[..., T], *arguments: object) -> tuple[T, asyncio.CancelledError | None]:
    """A thread's work to its end, and the cancellation that came meanwhile: weights must not change unrecorded."""
    work, cancelled = asyncio.ensure_future(asyncio.to_thread(function, *arguments)), None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and work.exception() is not None:
        raise cancelled
    return work.result(), cancelled


def _check(config: EngineConfig, rows: Sequence[PromptRow], teachers: Mapping[str, TeacherScorer]) -> None:
    if not rows:
        raise ConfigError("no prompts to train on", hint="check the data file and the length limits")
    check_mixture(config, rows)
    if not isinstance(config.objective, SFT):
        for teacher_id in {row.teacher_id for row in rows}:
            teacher_for(teachers, teacher_id)
    check_support(support_of(config.objective), teachers)
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


def _staleness(step: int, taken: InFlight) -> int:
    """Versions between the weights that sampled and those that learn; a sampler may be synced less than every step."""
    said = [int(version) for version in taken.versions if version.isdecimal()]
    return step - min([taken.version, *said])


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
