"""What a run leaves on disk while it goes and when it ends: checkpoints, and the student in a loadable folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topkd.compose.progress import Progress
from topkd.compose.run.resume import PreviousRun
from topkd.engine.checkpoint.checkpoint import (
    Stateful,
    load_weights,
    read_weights,
    restore,
    save_checkpoint,
    save_student,
)
from topkd.engine.config.engine_config import EngineConfig
from topkd.engine.learner.learner import Learner
from topkd.engine.learner.objectives import describe_objective
from topkd.engine.loop.hooks import Position
from topkd.engine.loop.metrics import MetricsLog
from topkd.report.load.run_folder import STUDENT


@dataclass(frozen=True, slots=True)
class RunSaver:
    """Writes for one run; of several processes the first alone does.

    Attributes:
        out: The run's folder.
        config: Its config.
        learner: Its learner.
        tokenizer: Saved beside the student.
        log: Its run log.
        remembered: Whoever gives the rollouts gives those in flight again.
        stateful: What else has a state.
        progress: Told where the student is.
    """

    out: Path
    config: EngineConfig
    learner: Learner
    tokenizer: Any
    log: MetricsLog
    remembered: bool
    stateful: Mapping[str, Stateful] | None
    progress: Progress

    def checkpoint(self, position: Position) -> None:
        """Keep the position. Every process calls it: sharded state is only had together."""
        if not self.learner.ranks.main:
            self.learner.state_dict()
            return
        save_checkpoint(
            self.out,
            position,
            learner=self.learner,
            run_log_bytes=self.log.kept(),
            keep=self.config.checkpoint.keep,
            # Of several processes each has rollouts of its own in flight: only a cache remembers them all.
            remembered=self.remembered or self.learner.ranks.size > 1,
            stateful=self.stateful,
        )

    def finish(self, reason: str) -> None:
        """Save the student, at the end ("") or early, with the reason in the run log."""
        learner = self.learner
        if not learner.ranks.main:
            return
        if reason:
            self.log.write("event", {"event": "stopped", "version": learner.version, "reason": reason})
        if not learner.version:
            return
        state = {"version": learner.version, **describe_objective(learner.objective), "stopped": bool(reason)}
        save_student(learner.student, self.tokenizer, self.out / STUDENT, state)
        if reason:
            self.progress.note(
                f"stopped after step {learner.version} of {self.config.steps}; the student so far: {self.out / STUDENT}"
            )


def restore_weights(previous: PreviousRun, student: Any) -> None:
    """Set the student to the checkpoint's weights; before its learner is made, which may copy them into shards."""
    if previous.checkpoint is not None:
        load_weights(student, read_weights(previous.checkpoint), where=str(previous.checkpoint.path))


def restore_state(previous: PreviousRun, learner: Learner, stateful: Mapping[str, Stateful] | None) -> Position:
    """Set everything else, and give the position to go on from."""
    if previous.checkpoint is None:
        return Position()
    restore(previous.checkpoint, learner, stateful)
    return previous.checkpoint.position
