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
    """A batch that was sampled from older weights and waits for its step. The current weights cannot sample it again.

    Attributes:
        step: The step that will learn from it (from 0).
        version: The weights that it was sampled from.
        versions: The policy versions that its rollouts carry.
        sample_s: Seconds that sampling took.
        places: Index of each rollout's row in the run's rows; None when a row is not one of them.
        rollouts: The rollouts; None when their source (a cache, a replay) can supply them again.
    """

    step: int
    version: int
    versions: tuple[str, ...]
    sample_s: float
    places: tuple[int, ...] | None = None
    rollouts: tuple[Rollout, ...] | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands, between two steps.

    Attributes:
        step: Steps taken.
        evaluated: The last step that was evaluated; -1 before the first evaluation.
        elapsed_s: Seconds of work so far, time before a resume included.
        queue: Batches in flight that later weights cannot sample again, in order.
    """

    step: int = 0
    evaluated: int = -1
    elapsed_s: float = 0.0
    queue: tuple[Queued, ...] = ()


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions that the loop calls at fixed points.

    Attributes:
        evaluate: Called in a thread before the first step, every ``eval_every`` steps and after the last. Returns one
            record, or one for each kind of prefixes.
        on_record: Called with every run log record, for a display or a tracker.
        publish: Awaited at the start and after each step, before anything is sampled from the new weights: sends weight
            version v to the sampler. Its result, if any, is added to the step's record.
        on_batch: Called in a thread before step n (from 1) learns from the batch.
        capture: Called in a thread after each step, before the next may begin: saves weight version v for
            ``publish(v)``. With this hook neither ``publish`` nor the sampler may read the learner's own weights;
            sampling and publishing then run while the learner works. Without it they take turns with the learner.
        context: Called in a thread before a rollout is scored: returns the row as the teacher is to see it.
        checkpoint: Called in a thread between two steps: every ``checkpoint.every`` steps, after the last, and when the
            run is stopped or fails.
        publish_while_sampling: With ``capture``: ``publish(v + 1)`` may run while a batch of v is being sampled (a
            server holds both, for example as LoRA adapters). Sampling must choose its version before its first
            ``await``, and keep it.
        foreign: The sampler returns what another run sampled: its versions are not the learner's, and the staleness is
            not known.
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
