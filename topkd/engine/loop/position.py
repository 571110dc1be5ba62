"""The position of a run between two steps, as a checkpoint keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from topkd.topk.samples import Rollout


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
