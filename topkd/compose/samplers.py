"""Where a run's rollouts come from, and how new weights get there."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from topkd.engine import EngineConfig
from topkd.engine.hooks import Record
from topkd.topk.protocols import Sampler


@dataclass(frozen=True, slots=True)
class Sampling:
    """A sampler and the way weights reach it.

    Attributes:
        sampler: Draws the rollouts.
        publish: Brings weight version v to it (see ``Hooks.publish``).
        lock: Held by the learner while weights change; an in-process sampler reads them under it.
        capture: Keeps a version for ``publish`` (see ``Hooks.capture``): the sampler has weights of its own.
        beside: It holds several versions (see ``Hooks.beside``).
    """

    sampler: Sampler
    publish: Callable[[int], Awaitable[Record | None]]
    lock: threading.Lock = field(default_factory=threading.Lock)
    capture: Callable[[int], None] | None = None
    beside: bool = False


def in_process(config: EngineConfig, student: Any, tokenizer: Any) -> Sampling:
    """The student itself, in this process: new weights are there at once."""
    from topkd.engine.sampler import InProcessSampler

    sampler = InProcessSampler(
        student, stop_ids=stop_ids(tokenizer), batch_size=config.rollout.batch_size, shown_k=config.k
    )

    async def publish(version: int) -> None:
        sampler.version = str(version)

    return Sampling(sampler, publish, sampler.lock)


def stop_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a completion of this student, wherever it is sampled."""
    return [tokenizer.eos_token_id] if tokenizer is not None and tokenizer.eos_token_id is not None else []
