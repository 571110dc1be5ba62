"""What a run is connected to beside its data flow; every hook is optional, and none changes what is learnt."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from topkd.engine.scoring import ScoredBatch

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hooks:
    """Called by the loop, in its order.

    Attributes:
        evaluate: In a thread: before the first step, every ``eval_every`` steps and after the last.
        on_record: Told every diary record, for a display or a tracker.
        publish: Awaited at the start and after each step, before anything is sampled from the new weights: brings
            weight version v to where sampling happens. Its result, if any, joins the step's record.
        on_batch: In a thread, before step n (from 1) learns from the batch.
    """

    evaluate: Callable[[], Record] | None = None
    on_record: Callable[[str, Record], None] | None = None
    publish: Callable[[int], Awaitable[Record | None]] | None = None
    on_batch: Callable[[int, ScoredBatch], None] | None = None
