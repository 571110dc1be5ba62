"""Trains with the opened parts of a run, in its folder: run log, provenance, checkpoints, and the final student."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkd.compose.config.functions import load_loss
from topkd.compose.config.run_config import RunConfig
from topkd.compose.data.digests import describe_rows
from topkd.compose.data.prompts import Prompts
from topkd.compose.preflight.lengths import check_token_ids_fit, list_stop_ids
from topkd.compose.preflight.preflight import Preflight
from topkd.compose.run.folder import collect_provenance
from topkd.compose.run.observers import Observers
from topkd.compose.run.resume import check_same_rows, describe_process_change, truncate_to_checkpoint
from topkd.compose.run.run import Run, RunResult
from topkd.compose.run.sampler import SamplingSetup
from topkd.compose.teachers.feedback import build_feedback_context
from topkd.compose.teachers.open import Teachers
from topkd.engine import EngineConfig
from topkd.engine.loop.hooks import Hooks, Position
from topkd.engine.loop.metrics import MetricsLog
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.scoring import Context, ScoredBatch
from topkd.report.load.run_folder import RUN_LOG, STUDENT, TOKENS
from topkd.topk.errors import TopkdError

if TYPE_CHECKING:
    from topkd.engine.learner.learner import Learner
    from topkd.engine.learner.token_view import TokenLoss
    from topkd.engine.loop.loop import Source

_INTERRUPTS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)  # requests to stop, not errors of the run


@dataclass(frozen=True, slots=True)
class TrainingParts:
    """Parts of a training run. Data only.

    Attributes:
        config: Settings of the run.
        student: The model, as it is before the first step.
        tokenizer: The tokenizer, which is saved with the student.
        rows: Prompts.
        teachers: The opened teachers.
        sampling: The sampler of the rollouts, and how it gets new weights.
        observers: Evaluation and trackers.
        loss: The function of a custom objective, if the caller passed it and the config does not name it.
        source: Supplies the rollouts instead of the sampler.
        context: Builds the row that the teacher sees, given the row and its completion.
        is_remembered: Whether rollouts in flight can be read again after a resume, from a cache.
        is_foreign: Whether the rollouts are from another run.
        notes: Further fields of the run log's first event.
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

    @classmethod
    def of_run_file(
        cls,
        config: RunConfig,
        student: Any,
        findings: Preflight,
        teachers: Teachers,
        *,
        sampling: SamplingSetup,
        observers: Observers,
    ) -> TrainingParts:
        """Build the parts of a run file whose preflight has passed."""
        prompts = findings.loaded_prompts
        return cls(
            config.with_eval_schedule(),
            student,
            prompts.tokenizer,
            prompts.rows,
            teachers,
            sampling,
            observers,
            context=build_feedback_context(config, prompts),
            notes=findings.notes(),
        )


def load_student(config: RunConfig, prompts: Prompts) -> Any:
    """Load the config's student and check that it has every id of the prompts."""
    from topkd.engine.models.student import Student

    model = config.student
    student = Student.load(model.model, model.device, model.dtype, lora=model.lora, seed=config.seed)
    check_token_ids_fit(config, prompts.rows, student.vocab_size)
    return student


async def run_training(run: Run, parts: TrainingParts) -> RunResult:
    """Train from the beginning, or from the previous run's checkpoint, to the end or to a stop."""
    from topkd.engine.checkpoint.checkpoint import load_weights, read_weights, restore
    from topkd.engine.loop.loop import LoopParts, distil

    config, prompts = parts.config, describe_rows(parts.rows)
    checkpoint, start = run.previous.checkpoint, Position()
    if checkpoint is not None:  # load weights before making the learner, which may copy them to shards
        check_same_rows(run.previous.events, prompts, where=str(run.out))
        load_weights(parts.student, read_weights(checkpoint), where=str(checkpoint.path))
    learner = _make_learner(run, parts)
    if checkpoint is not None:
        restore(checkpoint, learner, parts.teachers.states)
        start = checkpoint.position
    if learner.ranks.main:
        truncate_to_checkpoint(run.out, run.previous)
    evals = [*run.previous.evals]
    run.progress.stage("distil", config.steps)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(MetricsLog(run.out / RUN_LOG if learner.ranks.main else Path(os.devnull)))
        saver = _RunSaver(run, parts, learner, log)
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
        except BaseException as error:  # an interrupt, a dead teacher: save the student, log the reason
            saver.save_after_error(error)
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
        stop_ids=[*list_stop_ids(parts.tokenizer, parts.config.rollout.stop_token_ids)],
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
    notes = {**({"teachers": parts.teachers.fingerprints} if parts.teachers.fingerprints else {}), **parts.notes}
    log.write("event", {**event, **shared, **collect_provenance(parts.student), **notes})


def _record_to(run: Run, observers: Observers, evals: list[dict[str, Any]]) -> Callable[[str, dict[str, Any]], None]:
    def record_entry(kind: str, record: dict[str, Any]) -> None:
        if kind == "eval":
            evals.append(record)
        if kind != "event":
            run.progress.record(kind, record)
        observers.on_record(kind, record)

    return record_entry


@dataclass(frozen=True, slots=True)
class _RunSaver:
    """Writes the checkpoints and the student of a run; with several processes, only the first one writes."""

    run: Run
    parts: TrainingParts
    learner: Learner
    log: MetricsLog

    def checkpoint(self, position: Position) -> None:
        """Write a checkpoint. Every process must call it, because all of them together hold sharded state."""
        from topkd.engine.checkpoint.checkpoint import save_checkpoint

        if not self.learner.ranks.main:
            self.learner.state_dict()
            return
        save_checkpoint(
            self.run.out,
            position,
            learner=self.learner,
            run_log_bytes=self.log.kept(),
            keep=self.parts.config.checkpoint.keep,
            # With several processes, each has its own rollouts in flight, and this checkpoint cannot hold them all.
            remembered=self.parts.is_remembered or self.learner.ranks.size > 1,
            stateful=self.parts.teachers.states,
        )

    def finish(self, reason: str) -> None:
        """Save the student, at the end ("") or early, with the reason in the run log."""
        from topkd.engine.checkpoint.checkpoint import save_student
        from topkd.engine.learner.objectives import describe_objective

        learner, folder = self.learner, self.run.out / STUDENT
        if not learner.ranks.main:
            return
        if reason:
            self.log.write("event", {"event": "stopped", "version": learner.version, "reason": reason})
        if not learner.version:
            return
        state = {"version": learner.version, **describe_objective(learner.objective), "stopped": bool(reason)}
        save_student(learner.student, self.parts.tokenizer, folder, state)
        if reason:
            steps = self.parts.config.steps
            self.run.progress.note(f"stopped after step {learner.version} of {steps}; the student so far: {folder}")

    def save_after_error(self, error: BaseException) -> None:
        """Save the student so far; if that fails, only show a note, because the first error is the one to report."""
        try:
            self.finish("interrupted" if isinstance(error, _INTERRUPTS) else type(error).__name__)
        except (TopkdError, OSError) as another:
            self.run.progress.note(f"the student so far could not be saved: {another}")


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
