"""The engine's loop over ready pieces, in a folder: run log, provenance, checkpoints, and the student it ends with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topkd.compose.data.digests import describe_rows
from topkd.compose.progress import Progress
from topkd.compose.run.folder import RUN_LOG, collect_provenance
from topkd.compose.run.resume import PreviousRun, check_same_rows, truncate_to_checkpoint
from topkd.compose.run.sampler import SamplingSetup, open_in_process, stop_ids
from topkd.compose.run.signals import StopSignals
from topkd.engine import EngineConfig
from topkd.engine.loop.hooks import Hooks
from topkd.engine.loop.loop import Source
from topkd.engine.loop.metrics import MetricsLog, read_metrics
from topkd.engine.loop.prompts import PromptRow
from topkd.engine.loop.scoring import Context, ScoredBatch
from topkd.topk.errors import TopkdError
from topkd.topk.protocols import Sampler, TeacherScorer

if TYPE_CHECKING:
    from topkd.engine.checkpoint.checkpoint import Stateful
    from topkd.engine.config.objectives import Objective
    from topkd.engine.learner.distributed import Ranks
    from topkd.engine.learner.token_view import TokenLoss

_INTERRUPTS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)  # somebody's wish, no error of the run


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run lies, and its records.

    Attributes:
        out: Its folder.
        steps: All step records, those before a resume included.
        evals: All evaluations.
        stopped: The signal that ended it early ("" when it ran to its end).
        already: It had been finished before; nothing was done.
    """

    out: Path
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    stopped: str = ""
    already: bool = False

    @classmethod
    def of_finished(cls, out: Path, former: PreviousRun) -> RunResult:
        """A resume that found nothing to do."""
        return cls(out, former.steps, former.evals, already=True)


async def run(
    config: EngineConfig,
    *,
    student: Any,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    teachers: Mapping[str, TeacherScorer],
    out: Path,
    progress: Progress,
    evaluate: Callable[[], dict[str, Any] | list[dict[str, Any]]] | None = None,
    sampling: SamplingSetup | None = None,
    wrap: Callable[[Sampler], Sampler] | None = None,
    on_batch: Callable[[int, ScoredBatch], None] | None = None,
    context: Context | None = None,
    on_record: Callable[[str, dict[str, Any]], None] | None = None,
    source: Source | None = None,
    account: Callable[[], dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    former: PreviousRun | None = None,
    command: str = "train",
    stops: StopSignals | None = None,
    ranks: Ranks | None = None,
    loss: TokenLoss | None = None,
    foreign: bool = False,
) -> RunResult:
    """Run ``config`` from its beginning, or from the checkpoint of ``former``, to its end or to a stop.

    Args:
        config: What shapes the run.
        student: The model, as it was before the first step.
        tokenizer: Saved beside it.
        rows: Prompts.
        teachers: teacher_id -> scorer.
        out: The run's folder.
        progress: Told what goes on.
        evaluate: Gives an evaluation's numbers.
        sampling: Where rollouts come from (None: the student in this process).
        wrap: Puts something around (or in place of) that sampler that remembers its rollouts: a cache.
        on_batch: Sees each batch before it is learnt from.
        context: Gives a row as the teacher is to see it, once it has been answered.
        on_record: Told every run log record, for a tracker.
        source: Gives the rollouts instead of any sampler.
        account: Tells what the run log should end with.
        notes: Joins the run log's first event: who the teachers are, say.
        stateful: What besides the learner has a state to be kept (a teacher that follows the student).
        former: What ``opened`` found in the folder.
        command: Which command can go on with the run.
        stops: Signals that end it in order.
        ranks: The processes that share the run.
        loss: An objective of one's own, in place of the config's.
        foreign: The rollouts are those of a run that is not this one.
    """
    from topkd.compose.run.saving import RunSaver, restore_state, restore_weights
    from topkd.engine.learner.learner import Learner
    from topkd.engine.loop.loop import distil

    former, prompts = former or PreviousRun(), describe_rows(rows)
    if former.checkpoint is not None:
        check_same_rows(out, prompts, where=str(out))
    sampling = sampling or open_in_process(config, student, tokenizer)
    restore_weights(former, student)
    objective = loss or config.objective
    learner = Learner(
        student,
        config.learner,
        objective,
        lock=sampling.lock,
        steps=config.steps,
        ranks=ranks,
        stop_ids=[*stop_ids(tokenizer), *config.rollout.stop_token_ids],
    )
    start = restore_state(former, learner, stateful)
    if learner.ranks.main:
        truncate_to_checkpoint(out, former)
    transcripts = _build_transcripts(objective, config, out, student, tokenizer, lock=sampling.lock, note=progress.note)
    evals = [*former.evals]

    def recorded(kind: str, record: dict[str, Any]) -> None:
        if kind == "eval":
            evals.append(record)
        if kind != "event":
            progress.record(kind, record)
        if on_record is not None:
            on_record(kind, record)

    progress.stage("distil", config.steps)
    with contextlib.ExitStack() as stack:
        main = learner.ranks.main
        log = stack.enter_context(MetricsLog(out / RUN_LOG if main else Path(os.devnull)))
        remembered = wrap is not None or source is not None
        keeper = RunSaver(out, config, learner, tokenizer, log, remembered, stateful, progress)
        stop = None if stops is None else stack.enter_context(stops.listening())
        event = {"event": "resumed", "step": start.step} if former.resumed else {"event": "start"}
        if former.resumed and not config.rollout.shards and (said := _describe_process_change(out, learner.ranks.size)):
            progress.note(said)
        log.write(
            "event",
            {
                **event, "command": command, "processes": learner.ranks.size, "prompts": prompts,
                **collect_provenance(student), **(notes or {}),
            },
        )  # fmt: skip
        try:
            steps = await distil(
                config,
                rows=rows,
                sampler=sampling.sampler if wrap is None else wrap(sampling.sampler),
                teachers=teachers,
                learner=learner,
                log=log,
                hooks=Hooks(
                    evaluate,
                    recorded,
                    sampling.publish,
                    on_batch or transcripts,
                    sampling.capture,
                    keeper.checkpoint,
                    context,
                    beside=sampling.beside,
                    foreign=foreign,
                ),
                source=source,
                start=start,
                earlier=former.steps,
                stop=stop,
                ranks=ranks,
            )
        except (
            BaseException
        ) as error:  # an interrupt, a dead teacher: what was learnt is kept, and the run log says why
            try:
                keeper.ended("interrupted" if isinstance(error, _INTERRUPTS) else type(error).__name__)
            except (TopkdError, OSError) as another:  # what ended the run is what is to be told
                progress.note(f"the student so far could not be kept: {another}")
            raise
        reason = "" if learner.version == config.steps else (stops.name if stops is not None else "") or "stop"
        if not reason and account is not None:
            log.write("event", account())
        keeper.ended(reason)
    return RunResult(out, former.steps + steps, evals, stopped=reason)


def _describe_process_change(out: Path, size: int) -> str:
    """What a run that goes on with more or fewer processes than before is told; "" for any other."""
    events = read_metrics(out / RUN_LOG, "event") if (out / RUN_LOG).exists() else []  # one machine of several has it
    former = [event["processes"] for event in events if "processes" in event]
    if not former or former[-1] == size:
        return ""
    return (
        f"careful: {former[-1]} of torchrun's processes before, {size} now: completions are drawn from other seeds "
        "from here on, since rollout.shards is 0 (one a process)"
    )


def _build_transcripts(
    objective: Objective | TokenLoss, config: EngineConfig, out: Path, student: Any, tokenizer: Any, *,
    lock: threading.Lock, note: Callable[[str], None],
) -> Callable[[int, ScoredBatch], None] | None:  # fmt: skip
    """The hook that records a few rollouts for the report; None for one of several processes."""
    from topkd.engine.loop.transcripts import TranscriptRecorder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a sharded student cannot be looked at by one rank alone
        return None
    return TranscriptRecorder(
        out / "tokens.jsonl",
        student=student,
        tokenizer=tokenizer,
        objective=objective,
        lock=lock,
        steps=config.steps,
        problem=note,
    ).on_batch
