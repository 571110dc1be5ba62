"""Training over opened parts, in a run's folder: run log, provenance, checkpoints, and the student it ends with."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkd.compose.config.functions import load_loss
from topkd.compose.data.digests import describe_rows
from topkd.compose.run.folder import collect_provenance
from topkd.compose.run.observers import Observers
from topkd.compose.run.resume import check_same_rows, describe_process_change, truncate_to_checkpoint
from topkd.compose.run.run import Run, RunResult
from topkd.compose.run.sampler import SamplingSetup, stop_ids
from topkd.compose.teachers.open import Teachers
from topkd.engine import EngineConfig
from topkd.engine.loop.hooks import Hooks
from topkd.engine.loop.metrics import MetricsLog
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.scoring import Context, ScoredBatch
from topkd.report.load.run_folder import RUN_LOG, TOKENS
from topkd.topk.errors import TopkdError

if TYPE_CHECKING:
    from topkd.engine.learner.learner import Learner
    from topkd.engine.learner.token_view import TokenLoss
    from topkd.engine.loop.loop import Source

_INTERRUPTS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)  # a request to stop is no error of the run


@dataclass(frozen=True, slots=True)
class TrainingParts:
    """What a run trains with. Data only.

    Attributes:
        config: What shapes the run.
        student: The model, as it was before the first step.
        tokenizer: Saved beside it.
        rows: Prompts.
        teachers: What scores.
        sampling: Where rollouts come from, and how new weights reach it.
        observers: Evaluation and trackers.
        loss: The function of a custom objective, where it was given and not named.
        source: Gives the rollouts instead of any sampler.
        context: Gives a row as the teacher is to see it, once it has been answered.
        is_remembered: Whoever gives the rollouts gives those in flight again: a cache.
        is_foreign: The rollouts are those of another run.
        notes: Joins the run log's first event.
        account: Returns the run log's last event.
    """

    config: EngineConfig
    student: Any
    tokenizer: Any
    rows: Sequence[PromptRow]
    teachers: Teachers
    sampling: SamplingSetup
    observers: Observers = field(default_factory=Observers)
    loss: TokenLoss | None = None
    source: Source | None = None
    context: Context | None = None
    is_remembered: bool = False
    is_foreign: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    account: Callable[[], dict[str, Any]] | None = None


async def run_training(run: Run, parts: TrainingParts) -> RunResult:
    """Train from the beginning, or from the previous run's checkpoint, to the end or to a stop."""
    from topkd.compose.run.saving import RunSaver, restore_state, restore_weights
    from topkd.engine.loop.loop import LoopParts, distil

    config, prompts = parts.config, describe_rows(parts.rows)
    if run.previous.checkpoint is not None:
        check_same_rows(run.previous.events, prompts, where=str(run.out))
    restore_weights(run.previous, parts.student)
    learner = _make_learner(run, parts)
    start = restore_state(run.previous, learner, parts.teachers.states)
    if learner.ranks.main:
        truncate_to_checkpoint(run.out, run.previous)
    evals = [*run.previous.evals]
    run.progress.stage("distil", config.steps)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(MetricsLog(run.out / RUN_LOG if learner.ranks.main else Path(os.devnull)))
        saver = RunSaver(
            run.out, config, learner, parts.tokenizer, log, parts.is_remembered, parts.teachers.states, run.progress
        )
        stop = stack.enter_context(run.signals.listen()) if run.signals is not None else asyncio.Event()
        _write_first_event(run, parts, log, learner.ranks.size, {"step": start.step, "prompts": prompts})
        hooks = Hooks(
            parts.observers.evaluate,
            _record_to(run, parts.observers, evals),
            parts.teachers.publish_after_step(parts.sampling.publish, run.ranks),
            _record_transcripts(run, parts),
            parts.sampling.capture,
            saver.checkpoint,
            parts.context,
            publish_while_sampling=parts.sampling.publish_while_sampling,
            foreign=parts.is_foreign,
        )
        loop_parts = LoopParts(
            config,
            parts.rows,
            parts.sampling.sampler,
            parts.teachers.scorers,
            parts.source,
            run.previous.steps,
            stop,
            learner.ranks,
        )
        try:
            steps = await distil(loop_parts, learner, log, hooks, start)
        except BaseException as error:  # an interrupt, a dead teacher: the student so far is kept, the log says why
            _save_after_error(run, saver, error)
            raise
        reason = "" if learner.version == config.steps else (run.signals.name if run.signals else "") or "stop"
        if not reason and parts.account is not None:
            log.write("event", parts.account())
        saver.finish(reason)
    return RunResult(run.out, run.previous.steps + steps, evals, stopped=reason)


def _make_learner(run: Run, parts: TrainingParts) -> Learner:
    from topkd.engine.learner.learner import Learner

    return Learner(
        parts.student,
        parts.config.learner,
        parts.config.objective,
        loss=parts.loss or load_loss(parts.config.objective),
        lock=parts.sampling.lock,
        steps=parts.config.steps,
        ranks=run.ranks,
        stop_ids=[*stop_ids(parts.tokenizer), *parts.config.rollout.stop_token_ids],
    )


def _write_first_event(
    run: Run, parts: TrainingParts, log: MetricsLog, processes: int, position: Mapping[str, Any]
) -> None:
    event: dict[str, Any] = {"event": "start"}
    if run.previous.resumed:
        event = {"event": "resumed", "step": position["step"]}
        if not parts.config.rollout.shards and (change := describe_process_change(run.previous, processes)):
            run.progress.note(change)
    shared = {"command": run.command, "processes": processes, "prompts": position["prompts"]}
    notes = {**parts.teachers.notes(), **parts.notes}
    log.write("event", {**event, **shared, **collect_provenance(parts.student), **notes})


def _record_to(run: Run, observers: Observers, evals: list[dict[str, Any]]) -> Callable[[str, dict[str, Any]], None]:
    def record_entry(kind: str, record: dict[str, Any]) -> None:
        if kind == "eval":
            evals.append(record)
        if kind != "event":
            run.progress.record(kind, record)
        observers.on_record(kind, record)

    return record_entry


def _save_after_error(run: Run, saver: Any, error: BaseException) -> None:
    try:
        saver.finish("interrupted" if isinstance(error, _INTERRUPTS) else type(error).__name__)
    except (TopkdError, OSError) as another:  # the first error is the one to report
        run.progress.note(f"the student so far could not be saved: {another}")


def _record_transcripts(run: Run, parts: TrainingParts) -> Callable[[int, ScoredBatch], None] | None:
    """Return the hook that records a few rollouts for the report; None for one of several processes."""
    from topkd.engine.loop.transcripts import TranscriptRecorder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one rank alone cannot run a sharded student
        return None
    return TranscriptRecorder(
        run.out / TOKENS,
        student=parts.student,
        tokenizer=parts.tokenizer,
        objective=parts.config.objective,
        lock=parts.sampling.lock,
        steps=parts.config.steps,
        problem=run.progress.note,
    ).on_batch
