"""Hooks that the loop calls (all optional; none changes the training) and its position."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from topkd.engine.loop.scoring import Context, ScoredBatch
from topkd.topk.samples import Rollout

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Queued:
    """A batch that was sampled from older weights and waits for its step: it cannot be drawn again.

    Attributes:
        step: Which step will learn from it (from 0).
        version: The weights that it was sampled from.
        versions: What its rollouts say of their policy's version.
        sample_s: How long it took to sample.
        places: Index of each rollout's row in the run's rows; None when a row is not one of them.
        rollouts: The rollouts; None when whoever gave them will give them again (a cache, a replay).
    """

    step: int
    version: int
    versions: tuple[str, ...]
    sample_s: float
    places: tuple[int, ...] | None = None
    rollouts: tuple[Rollout, ...] | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Between two steps.

    Attributes:
        step: Steps taken.
        evaluated: The last of them that was evaluated; -1 before the first evaluation.
        elapsed_s: Seconds of work so far, over all the run's processes one after the other.
        queue: Batches in flight that later weights could not repeat, in order.
    """

    step: int = 0
    evaluated: int = -1
    elapsed_s: float = 0.0
    queue: tuple[Queued, ...] = ()


@dataclass(frozen=True, slots=True)
class Hooks:
    """Called by the loop, in its order.

    Attributes:
        evaluate: In a thread: before the first step, every ``eval_every`` steps and after the last. One record, or one
            for each kind of prefixes.
        on_record: Told every run log record, for a display or a tracker.
        publish: Awaited at the start and after each step, before anything is sampled from the new weights: brings
            weight version v to where sampling happens. Its result, if any, joins the step's record.
        on_batch: In a thread, before step n (from 1) learns from the batch.
        capture: In a thread, after each step and before the next may begin: keeps weight version v where ``publish(v)``
            will find it. Who gives it says that neither ``publish`` nor the sampler reads the learner's own weights, so
            sampling and publishing go on while the learner works; without it they take turns with the learner.
        context: In a thread, before a rollout is scored: the row as the teacher is to see it, given what was written.
        checkpoint: In a thread, between two steps: every ``checkpoint.every`` steps, after the last, and when the run
            is stopped or fails.
        publish_while_sampling: With ``capture``: ``publish(v + 1)`` may come while a batch of v is being drawn (a
            server that holds both, as adapters are held). A draw takes its version before it first waits, and keeps it.
        foreign: The sampler gives what another run drew: its versions are not the learner's, and how far its policy is
            from the learner's is not known.
    """

    evaluate: Callable[[], Record | list[Record]] | None = None
    on_record: Callable[[str, Record], None] | None = None
    publish: Callable[[int], Awaitable[Record | None]] | None = None
    on_batch: Callable[[int, ScoredBatch], None] | None = None
    capture: Callable[[int], None] | None = None
    checkpoint: Callable[[Position], None] | None = None
    context: Context | None = None
    publish_while_sampling: bool = False
    foreign: bool = False
